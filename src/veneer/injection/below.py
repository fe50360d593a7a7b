"""What a called adapter stands on: a tensor of its host module, with the changes of the attachments that act before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .forms import by_rows
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
            tensor = _changed(seam, param, tensor)
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def _changed(seam: CallSeam, param: str, tensor: Tensor) -> Tensor:
    """The tensor with one seam's changes of it."""
    if getattr(seam.sites[0], "param", None) != param or seam.write.side == "in" or seam.asleep():  # x has been changed already
        return tensor
    share = 1.0 if seam.place is None else seam.place.share(seam)
    changed = by_rows(seam.sites, seam.adapters, tensor, 0, _change) if share else tensor
    return changed if share in (0, 1) else torch.lerp(tensor, changed, share)


def _change(adapter: Any, part: Tensor) -> Tensor:
    return WeightSeam.change(adapter, part) if hasattr(adapter, "weight") else part
