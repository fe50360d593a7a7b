"""A small model with weights and biases written out as functions of an adapter's tensors: outputs and gradients of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.bottlenecks import stirred
from veneer.injection import Attachment, attach
from veneer.injection.attachment.probe import tensors
from veneer.injection.registry import hosts

Tensors = dict[str, Tensor]
Written = Callable[[Any, Tensors, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def small_model(host: str, key: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model of a host in float64, every parameter perturbed, and its sample inputs."""
    torch.manual_seed(0)
    described = hosts.get(host)()
    model = described.tiny()[key]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    sample = described.sample(model)
    doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in sample.items()}
    return model, doubled


def loss_of(output: Any) -> Tensor:
    """A scalar with another weight for every element of the output."""
    flat = torch.cat([t.flatten() for t in tensors(output)])
    return (flat * torch.randn(flat.shape, generator=torch.Generator().manual_seed(5), dtype=flat.dtype)).sum()


def check_written_out(host: str, key: str, method: str, written: Written, **options: Any) -> Attachment:
    """Outputs, gradients and the merge of an attachment equal those of a model whose weights and biases are `written`.

    Args:
        written: (site, tensors of the adapter by name, W, b) to W' and b'; called with copies that require gradients.
    Returns:
        The attachment, merged.
    """
    model, inputs = small_model(host, key)
    bare: nn.Module = copy.deepcopy(model)
    tuned = attach(model, method, **options)
    adapters = stirred(tuned)
    shared: dict[int, Tensor] = {}
    leaves = {
        site: {n: shared.setdefault(id(p), p.detach().clone().requires_grad_()) for n, p in adapter.named_parameters()}
        for site, adapter in adapters.items()
    }
    changed: dict[str, Tensor] = {}
    base = dict(bare.named_parameters())
    site: Any
    for name, (site, _) in tuned.parts.items():
        path, bias = f"{site.path}.{site.param}", getattr(site, "bias", "")
        assert getattr(site, "rows", None) is None
        changed[path], after = written(site, leaves[name], base[path].detach(), base[bias].detach() if bias else None)
        if bias:
            changed[bias] = after  # type: ignore[assignment]
    expected = torch.func.functional_call(bare, changed, (), inputs)
    got = model(**inputs)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert max((a - b).abs().max().item() for a, b in zip(tensors(got), tensors(bare(**inputs)), strict=True)) > 1e-3
    loss_of(expected).backward()
    loss_of(got).backward()
    for name, adapter in adapters.items():
        for n, p in adapter.named_parameters():
            torch.testing.assert_close(
                p.grad, leaves[name][n].grad, rtol=1e-8, atol=1e-9, msg=lambda t, at=f"{name}.{n}": f"{at}: {t}"
            )
    tuned.merge()
    with torch.no_grad():
        for a, b in zip(tensors(model(**inputs)), tensors(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return tuned


def check_causal_text(method: str) -> None:
    """With a method on the text tower of a CLIP, a change of the last token changes no earlier feature."""
    model, inputs = small_model("open_clip", "vit")
    tuned = attach(model, method, where="name:transformer.*")
    stirred(tuned)
    assert {site.tower for site, _ in tuned.parts.values()} == {"text"}
    seen: list[Tensor] = []
    model.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    text = inputs["text"].clone()
    with torch.no_grad():
        model.encode_text(text)
        text[:, -1] = (text[:, -1] + 1) % 5
        model.encode_text(text)
    torch.testing.assert_close(seen[0][:, :-1], seen[1][:, :-1])
    assert (seen[0][:, -1] - seen[1][:, -1]).abs().max() > 1e-3
