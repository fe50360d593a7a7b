"""What a called adapter stands on: a tensor of its host module, with the changes of the attachments that act before."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .forms import blend, by_rows, cast
from .method import Adapter
from .parametrized import WeightSeam
from .seams import CallSeam


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


def _changed(seam: CallSeam, module: nn.Module, param: str, tensor: Tensor) -> Tensor:
    """The tensor with one seam's changes of it."""
    site = seam.sites[0]
    shifts = hasattr(seam.adapters[0], "bias") and getattr(site, "bias", "") == f"{site.path}.{param}"
    if seam.asleep() or not (shifts or getattr(site, "param", None) == param):
        return tensor
    share = 1.0 if seam.place is None else seam.place.share(seam)
    if not share:
        return tensor
    changed = by_rows(seam.sites, seam.adapters, tensor, 0, functools.partial(_shift, seam, module) if shifts else _change)
    return changed if share == 1 else torch.lerp(tensor, changed, share)


def _change(adapter: Any, part: Tensor) -> Tensor:
    return WeightSeam.change(adapter, part) if hasattr(adapter, "weight") else part


def _shift(seam: CallSeam, module: nn.Module, adapter: Any, part: Tensor) -> Tensor:
    """b' of one adapter, from W as that one finds it."""
    site = next(site for site, other in zip(seam.sites, seam.adapters, strict=True) if other is adapter)

    def weight() -> Tensor:
        found = tensor_below(adapter, module, site.param, site.rows)
        assert found is not None
        return found

    before = part if adapter.blends else cast(part, adapter)
    return blend(adapter, lambda bias: adapter.bias(bias, weight), before).to(part.dtype)
