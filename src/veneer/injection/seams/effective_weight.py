"""Effective weight seen by an adapter: the host's own tensor with the changes of earlier attachments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..method import Adapter
from .adapter_calls import base_tensor, blend, by_rows, cast
from .call_seam import CallSeam
from .weight_seam import WeightSeam


def tensor_below(adapter: Adapter, module: nn.Module, param: str, rows: tuple[int, int] | None) -> Tensor | None:
    """The tensor that made the `y` which `adapter.output(x, y)` is given: W or b of `y = W x + b`.

    The host's own, with the weight forms of the adapters whose hooks ran before; so a method that scales W x, or divides by its
    norm, means the same beside others as in its weight form. Costs nothing where it is alone.

    Args:
        module: the site's module, as found in `enter`. `rows`: the site's.
    Returns:
        The rows, or None for a parameter that the module does not have.
    """
    tensor: Tensor | None = getattr(module, param, None)
    if tensor is None:
        return None
    for seam in module._modules.values():
        if isinstance(seam, CallSeam):
            if any(other is adapter for other in seam.adapters):
                break
            tensor = _changed(seam, module, param, tensor)
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def tensor_in_chain(adapter: Adapter, module: nn.Module, param: str, rows: tuple[int, int] | None) -> Tensor:
    """Effective tensor seen by an adapter that acts in the weights: the base tensor with the changes of those before it."""
    tensor = base_tensor(module, "", param)
    for adapters, change in _chain(module, param):
        if any(other is adapter for other in adapters):
            break
        tensor = change(tensor)
    return tensor if rows is None else tensor[slice(*rows)]


def _chain(module: Any, param: str) -> Iterator[tuple[Iterable[nn.Module], Callable[[Tensor], Tensor]]]:
    """Yields the adapters and the change of each step in a tensor, in order."""
    for seam in module.parametrizations[param] if parametrize.is_parametrized(module, param) else ():
        if not isinstance(seam, WeightSeam):
            yield (), seam
        elif not seam.passes():
            for call in () if seam.beneath is None else seam.beneath.acting():
                if param in tensors_of(call):
                    yield call.adapters, functools.partial(change_of, call, module, param)
            yield seam.adapters, seam.own


def tensors_of(seam: CallSeam) -> set[str]:
    """Names of the module's tensors that a call seam changes, in its adapters' weight and bias forms."""
    site = seam.sites[0]
    owner, _, bias = site.bias.rpartition(".") if hasattr(seam.adapters[0], "bias") else ("", "", "")
    return {site.param, bias} if bias and owner == site.path else {site.param}


def _changed(seam: CallSeam, module: nn.Module, param: str, tensor: Tensor) -> Tensor:
    """The tensor with one seam's changes of it."""
    shifts, site = _shifts(seam, param), seam.sites[0]
    if seam.asleep() or seam.in_weights() or not (shifts or getattr(site, "param", None) == param):
        return tensor
    return change_of(seam, module, param, tensor)


def change_of(seam: CallSeam, module: nn.Module, param: str, tensor: Tensor) -> Tensor:
    """The tensor with one call seam's change, in its adapters' weight or bias form."""
    shifts = _shifts(seam, param)
    share = 1.0 if seam.place is None else seam.place.share(seam)
    if not share:
        return tensor
    changed = by_rows(seam.sites, seam.adapters, tensor, 0, functools.partial(_shift, seam, module) if shifts else _change)
    return changed if share == 1 else torch.lerp(tensor, changed, share)


def _shifts(seam: CallSeam, param: str) -> bool:
    """True if the tensor is the bias after a seam's weight, which its adapters change too."""
    site = seam.sites[0]
    return hasattr(seam.adapters[0], "bias") and getattr(site, "bias", "") == f"{site.path}.{param}"


def _change(adapter: Any, part: Tensor) -> Tensor:
    return WeightSeam.change(adapter, part) if hasattr(adapter, "weight") else part


def _shift(seam: CallSeam, module: nn.Module, adapter: Any, part: Tensor) -> Tensor:
    """b' of one adapter, from W as that one finds it."""
    site = next(site for site, other in zip(seam.sites, seam.adapters, strict=True) if other is adapter)

    def weight() -> Tensor:
        if seam.in_weights():
            return tensor_in_chain(adapter, module, site.param, site.rows)
        found = tensor_below(adapter, module, site.param, site.rows)
        assert found is not None
        return found

    before = part if adapter.blends else cast(part, adapter)
    return blend(adapter, lambda bias: adapter.bias(bias, weight), before).to(part.dtype)
