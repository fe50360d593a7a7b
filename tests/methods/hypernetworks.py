"""HyperFormer's equations in plain torch, and hooks that apply them to a bare model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from veneer.injection import Attachment
from veneer.injection.registry import hosts

SMALL: dict[str, Any] = {"reduction": 4, "embedding": 5, "hidden": 7, "projected": 6}
Leaves = dict[str, Tensor]


def leaves_of(tuned: Attachment) -> Leaves:
    """Copies of the hypernetwork's parameters that collect gradients of their own."""
    _, adapter = next(iter(tuned.parts.values()))
    shared: Any = adapter.shared
    return {name: p.detach().clone().requires_grad_() for name, p in shared.named_parameters()}


def affine(leaves: Leaves, name: str, v: Tensor) -> Tensor:
    return leaves[f"{name}.weight"] @ v + leaves[f"{name}.bias"]


def normalized(v: Tensor, eps: float) -> Tensor:
    """The last dimension with mean 0 and variance 1."""
    return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def change(leaves: Leaves, key: str, parts: list[Tensor], norm: bool, y: Tensor) -> Tensor:
    """LN(Up(gelu(Down(y)))) for y (…, width), with the parameters that generator `key` computes from embeddings."""
    v = affine(leaves, "projection", affine(leaves, "hidden", torch.cat(parts)).clamp(min=0))
    if norm:
        v = normalized(v, 1e-6) * leaves["norm.weight"] + leaves["norm.bias"]
    width = y.shape[-1]
    down, down_bias, up, up_bias, scale, shift = (
        affine(leaves, f"generators.{key}.{name}", v) for name in ("down", "down_bias", "up", "up_bias", "norm", "norm_bias")
    )
    low = gelu(y @ down.view(-1, width).T + down_bias, approximate="tanh")
    return normalized(low @ up.view(width, -1).T + up_bias, 1e-5) * scale + shift


def hooked(host: str, key: str, wide: float = 0.05) -> tuple[nn.Module, nn.Module]:
    """Two equal small models in double precision."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = hosts.get(host)().tiny()[key]().double().eval().requires_grad_(False)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=wide)
        models.append(model)
    return models[0], models[1]


def apply_by_hooks(bare: nn.Module, tuned: Attachment, reference: Callable[[Any, Tensor], Tensor]) -> None:
    """Adds `reference(site, y)` to the output y of every branch of a bare model, channels last."""
    for site, _ in tuned.parts.values():

        def hook(module: nn.Module, args: Any, output: Any, site: Any = site) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            first = site.layout == "NCHW"
            added = reference(site, y.movedim(1, -1) if first else y)
            y = y + (added.movedim(-1, 1) if first else added)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        port: Any = site.write  # type: ignore[union-attr]
        assert port.side == "out"
        bare.get_submodule(port.path).register_forward_hook(hook)


def stir(tuned: Attachment) -> None:
    """Moves every parameter away from its initial value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)


def check_model(host: str, key: str, tuned: Attachment, pair: tuple[nn.Module, nn.Module], reference: Any) -> None:
    """Outputs and gradients for each task equal those of the bare model with hooks. `reference(leaves, task, site, y)`."""
    bare, model = pair
    inputs = {name: value.double() if value.is_floating_point() else value
              for name, value in hosts.get(host)().sample(model).items() if torch.is_tensor(value)}  # fmt: skip
    stir(tuned)
    leaves, current = leaves_of(tuned), [0]
    apply_by_hooks(bare, tuned, lambda site, y: reference(leaves, current[0], site, y))
    outputs = []
    for index, name in enumerate(tuned.tasks):
        tuned.task, current[0] = name, index
        expected, got = vector(bare(**inputs)), vector(model(**inputs))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        expected.square().sum().backward()
        got.square().sum().backward()
        outputs.append(got.detach())
    shared: Any = next(iter(tuned.parts.values()))[1].shared
    for name, p in shared.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-7, atol=1e-9)
        assert p.grad.abs().max() > 0, name
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def vector(output: Any) -> Tensor:
    """All tensors of an output in one vector."""
    if torch.is_tensor(output):
        return output.flatten()
    values = output if isinstance(output, (tuple, list)) else output.values()
    return torch.cat([vector(value) for value in values])
