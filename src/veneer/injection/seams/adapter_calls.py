"""Calls the forms of adapters for seams: blends by strength, casts dtypes and applies row slices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapter_forms import Blended, InPlaceOutputAdapter, InputAdapter, OutputAdapter

Call = Callable[[Any, Tensor, Tensor, bool], Tensor]  # (adapter, x, y, overwrite y) -> y'


def blend(adapter: Blended, form: Callable[..., Tensor], before: Tensor, *inputs: Tensor) -> Tensor:
    """`before + strength * (form(*inputs, before) - before)`; exactly `before` at strength 0 and `form(…)` at strength 1."""
    after = form(*inputs, before)
    if adapter.applies_strength:
        return after.to(before.dtype)
    return torch.lerp(before, after.to(before.dtype), adapter.strength.to(before.dtype))


def call_of(adapter: Any) -> Call:
    """The function by which a call seam applies an adapter; chosen once, so that forward passes do not check for forms."""
    if isinstance(adapter, InputAdapter):
        return call_input
    if not adapter.applies_strength:
        return call_blended
    return call_in_place if adapter.overwrites else call_output


def call_output(adapter: OutputAdapter, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
    """y' of an adapter that applies its strength itself (`applies_strength`)."""
    return adapter.output(cast(x, adapter) if adapter.casts else x, y).to(y.dtype)


def call_in_place(adapter: InPlaceOutputAdapter, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
    """As `call_output`, with y modified in place if `overwrite`."""
    return adapter.output(cast(x, adapter) if adapter.casts else x, y, overwrite).to(y.dtype)


def call_blended(adapter: OutputAdapter, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
    """y' of an adapter, blended with y by its strength."""
    return blend(adapter, adapter.output, cast(y, adapter), cast(x, adapter) if adapter.casts else x).to(y.dtype)


def call_input(adapter: InputAdapter, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
    """x' of a layer, passed as y because it is the tensor that the seam changes."""
    return blend(adapter, adapter.input, y if adapter.applies_strength else cast(y, adapter)).to(y.dtype)


def is_tracing() -> bool:
    """True while compiling, exporting, tracing or capturing a CUDA graph."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state()) or capturing


def adapter_dtype(adapter: Any) -> torch.dtype | None:
    """The dtype of an adapter's first parameter, or None if it has none."""
    dtype = next((p.dtype for p in adapter._parameters.values() if p is not None), None)  # faster than `parameters()`
    return next((p.dtype for p in adapter.parameters()), None) if dtype is None else dtype


def cast(x: Tensor, adapter: Any) -> Tensor:
    """`x` in the adapter's dtype, unless autocast is enabled or `x` has integers, such as token ids."""
    dtype = adapter_dtype(adapter)
    if dtype in (None, x.dtype) or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a forward pass, a tensor."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def main_output(output: Any) -> Tensor:
    """A module's output tensor; the first element if the output is a tuple."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def apply_by_rows(sites: Sequence[Any], adapters: Any, y: Tensor, dim: int, apply: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Applies each adapter to its rows of `y` along `dim` and concatenates the results; other rows do not change."""
    if len(sites) == 1 and getattr(sites[0], "rows", None) is None:
        return apply(adapters[0], y)
    ends = sorted({0, y.shape[dim], *(end for site in sites for end in site.rows)})
    starts = {site.rows[0]: adapter for site, adapter in zip(sites, adapters, strict=True)}
    pieces = y.split([b - a for a, b in itertools.pairwise(ends)], dim)  # one backward node; narrow makes one per piece
    outputs = (apply(starts[a], piece) if a in starts else piece for a, piece in zip(ends, pieces, strict=False))
    return torch.cat(list(outputs), dim)


def module_at(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)`, ten times as fast.

    Raises:
        AttributeError: there is no such module.
    """
    module = root
    for key in path.split(".") if path else ():
        child = module._modules.get(key)
        if child is None:
            return root.get_submodule(path)  # raises, and names the missing part
        module = child
    return module


def base_tensor(tower: nn.Module, path: str, param: str) -> Tensor:
    """The host's original parameter or buffer, without parametrizations."""
    module: Any = module_at(tower, path)
    if parametrize.is_parametrized(module, param):
        tensor: Tensor = module.parametrizations[param].original
        return tensor
    tensor = getattr(module, param)
    return tensor
