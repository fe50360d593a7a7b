"""W' = weight(W) for one tensor, rounded once, at about the speed of a copy where the change is a low-rank product."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_forms import LowRankAdapter
from ..seams.adapter_calls import blend

CACHE = 1 << 16  # numbers a thread works on at a time: 256 KiB in single precision, which second-level caches hold; 16 times
# as many where there is one step, for which a third-level one will do


def folded(weight: Tensor, group: Sequence[tuple[Any, Any]]) -> Tensor:
    """A new tensor like `weight`, with the weight form of each adapter in its rows.

    Computed in single precision or wider, whatever the weight's and the adapters' dtypes, and rounded once.

    Args:
        group: sites and their adapters; one for all rows, or several with disjoint `rows`.
    """
    after = torch.empty_like(weight)
    with _precise(weight):
        if group[0][0].rows is None:
            _fold(group[0][1], weight, after)
            return after
        end = 0
        for site, adapter in sorted(group, key=lambda part: part[0].rows):
            start, stop = site.rows
            after[end:start] = weight[end:start]
            _fold(adapter, weight[start:stop], after[start:stop])
            end = stop
        after[end:] = weight[end:]
    return after


def _fold(adapter: Any, weight: Tensor, after: Tensor) -> None:
    with widened(adapter, torch.float32):
        if isinstance(adapter, LowRankAdapter):
            left, right = adapter.factors()
            _add(weight, left, right, after)
        else:
            wide = torch.promote_types(weight.dtype, torch.float32)
            after.copy_(blend(adapter, adapter.weight, weight.to(wide)))


def _add(weight: Tensor, left: Tensor, right: Tensor, after: Tensor) -> None:
    """W + C D. One pass over memory: some rows at a time are (widened,) added to (and rounded) while they are in a cache.

    Args:
        left, right: C (groups, d_out / groups, rank) and D (groups, rank, width).
    """
    wide = torch.promote_types(weight.dtype, left.dtype)
    groups, width = left.shape[0], right.shape[2]
    if groups > 1 or weight.device.type != "cpu":
        matrix = weight.to(wide).reshape(groups, -1, width)
        after.copy_(torch.baddbmm(matrix, left.to(wide), right.to(wide)).reshape(weight.shape))
        return
    left, right = left[0].to(wide), right[0].to(wide)
    direct = weight.dtype == wide and weight.is_contiguous() and after.is_contiguous()
    count = max(1, (16 if direct else 1) * CACHE * torch.get_num_threads() // width)
    room = torch.empty(0 if direct else min(count, len(weight)), width, dtype=wide)
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        if direct:
            torch.addmm(weight[rows].flatten(1), left[rows], right, out=after[rows].flatten(1))
            continue
        some = room[: len(left[rows])]
        some.view(weight[rows].shape).copy_(weight[rows])
        after[rows] = some.addmm_(left[rows], right).view(weight[rows].shape)


def _precise(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast, which would round the products."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


@contextlib.contextmanager
def widened(adapter: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The adapter's tensors in `dtype` or wider, inside the block."""
    found = (*adapter.parameters(), *adapter.buffers())
    narrow = [(t, t.data) for t in found if t.is_floating_point() and t.itemsize < dtype.itemsize]
    try:
        for tensor, data in narrow:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
