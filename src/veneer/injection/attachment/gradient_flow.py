"""Finds layers that stop gradients: kernels without a backward pass, and layers that run without autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import BlockedGradient
from ..seams.seam import Seam


@contextlib.contextmanager
def check_gradient_flow(towers: Iterable[nn.Module]) -> Iterator[None]:
    """Watches the forward passes inside the block: a layer whose input requires gradients must return such an output once.

    Only modules with a weight of two or more dimensions are watched, and none of the adapters'. One call with gradients is
    enough, because an adapter may run the host without them first. With gradient checkpointing, forward passes without
    autograd are skipped, because they are repeated with it.

    Raises:
        BlockedGradient: at the end of the block; names the layers.
    """
    passes: dict[str, bool] = {}
    handles = [
        module.register_forward_hook(_hook(path, passes, checkpoints), with_kwargs=True)
        for tower, checkpoints in [(tower, _checkpoints(tower)) for tower in towers]
        for path, module in _host_modules(tower, "")
        if any(p is not None and p.ndim > 1 for p in module._parameters.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    blocked = tuple(path for path, any_call in passes.items() if not any_call)
    if blocked:
        _raise_for_layers(blocked)


def _raise_for_layers(layers: tuple[str, ...]) -> NoReturn:
    """Raises the error for layers that stop gradients."""
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    raise BlockedGradient(
        f"no gradient passes through {', '.join(layers[:3])}{more}: the output does not require gradients although the input "
        "does, so adapters before it would not train. A quantization that also quantizes activations can cause this; use one "
        "of weights only, such as nf4 or int8.",
        where=layers[0],
        given=layers,
        expected="an output that requires gradients",
    )


def _host_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and its descendants without adapters."""
    yield path, module
    for name, child in module.named_children():
        if not isinstance(child, Seam):
            yield from _host_modules(child, f"{path}.{name}" if path else name)


def _checkpoints(tower: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in tower.modules())


def _hook(path: str, passes: dict[str, bool], checkpoints: bool) -> Any:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if checkpoints and not torch.is_grad_enabled():
            return
        if any(_is_float(value) and value.requires_grad for value in (*args, *kwargs.values())):
            outputs = [value for value in (output if isinstance(output, tuple) else (output,)) if _is_float(value)]
            if outputs:
                passes[path] = passes.get(path, False) or any(value.requires_grad for value in outputs)

    return check


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
