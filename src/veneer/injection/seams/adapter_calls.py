"""How a seam applies an adapter's forms: blending with strength, casting, row slices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..method import Adapter


def blend(adapter: Adapter, form: Callable[..., Tensor], before: Tensor, *inputs: Tensor) -> Tensor:
    """`before + strength * (form(*inputs, before) - before)`; exactly `before` at strength 0 and `form(…)` at strength 1."""
    after = form(*inputs, before)
    if adapter.blends:
        return after.to(before.dtype)
    return torch.lerp(before, after.to(before.dtype), adapter.strength.to(before.dtype))


def recorded() -> bool:
    """True while what runs is written down to be run again: by `torch.compile` or export, a trace, a CUDA graph."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state()) or captured


def dtype_of(adapter: nn.Module) -> torch.dtype | None:
    """The dtype of an adapter's first parameter, or None if it has none."""
    own = next((p.dtype for p in adapter._parameters.values() if p is not None), None)  # quicker, and asked in every call
    return next((p.dtype for p in adapter.parameters()), None) if own is None else own


def cast(x: Tensor, adapter: nn.Module) -> Tensor:
    """`x` in the adapter's dtype, unless autocast chooses dtypes or `x` holds ids."""
    dtype = dtype_of(adapter)
    if dtype in (None, x.dtype) or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor argument of a module call."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def main_output(output: Any) -> Tensor:
    """The tensor of a module's output, which may be a tuple that begins with it."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def by_rows(sites: Sequence[Any], adapters: Any, y: Tensor, dim: int, apply: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Apply each adapter to its rows of `y` along `dim` and put the pieces together again."""
    if len(sites) == 1 and getattr(sites[0], "rows", None) is None:
        return apply(adapters[0], y)
    ends = sorted({0, y.shape[dim], *(end for site in sites for end in site.rows)})
    whose = {site.rows[0]: adapter for site, adapter in zip(sites, adapters, strict=True)}
    pieces = y.split([b - a for a, b in itertools.pairwise(ends)], dim)  # one pass backward; narrow takes one a piece
    changed = (apply(whose[a], part) if a in whose else part for a, part in zip(ends, pieces, strict=False))
    return torch.cat(list(changed), dim)


def module_at(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)`, in a tenth of its time.

    Raises:
        AttributeError: there is none.
    """
    found = root
    for key in path.split(".") if path else ():
        child = found._modules.get(key)
        if child is None:
            return root.get_submodule(path)  # which says what lacks
        found = child
    return found


def base_tensor(tower: nn.Module, path: str, param: str) -> Tensor:
    """The host's own tensor, also where it is parametrised."""
    module: Any = module_at(tower, path)
    if parametrize.is_parametrized(module, param):
        tensor: Tensor = module.parametrizations[param].original
        return tensor
    tensor = getattr(module, param)
    return tensor
