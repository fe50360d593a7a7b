"""Splits low-rank factors of a fused projection into those of its slices, and merges them back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.injection import LoadError
from veneer.injection.sites import WeightSite

from .._io.mapped_tensors import count_use
from .._io.reader import File
from .kohya import NamedLayer


class LoRAFactors(NamedTuple):
    """Low-rank factors of a weight update s·B A: `down` (rank, d_in[, k, k]), `up` (d_out, rank[, 1, 1]), s."""

    down: Tensor
    up: Tensor
    scaling: float


def split_factors(file: File, name: str, place: NamedLayer, pair: LoRAFactors) -> list[tuple[WeightSite, LoRAFactors]]:
    """Factors of each site: its rows of `up`, restricted to components with nonzero rows.

    Raises:
        LoadError: the rows do not match the slices.
    """
    down, up, scaling = pair
    if place.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    if len(place.sites) == 1:
        return [(place.sites[0], LoRAFactors(down, up, scaling))]
    rows = [site.d_out for site in place.sites]
    if down.ndim != 2 or up.shape != (sum(rows), down.shape[0]):
        raise LoadError(
            f"{file.path}: misshapen: {name} has up {tuple(up.shape)} and down {tuple(down.shape)}, for {sum(rows)} rows. It was "
            "made for another base model.",
            file=file.path,
            where=name,
            misshapen={"up": (tuple(up.shape), (sum(rows), down.shape[0]))},
        )
    slices = [(site, part, _nonzero_components(part)) for site, part in zip(place.sites, up.split(rows), strict=True)]
    count_use(up)
    if not any(keep.any() for _, _, keep in slices):
        return [(site, LoRAFactors(down, part, scaling)) for site, part, _ in slices]
    selected = [(site, part, _as_slice(keep)) for site, part, keep in slices if keep.any()]
    return [(site, LoRAFactors(down[keep], part[:, keep], scaling)) for site, part, keep in selected]


def _as_slice(keep: Tensor) -> slice | Tensor:
    """A mask with a true element, as a slice if these are contiguous: indexing with it needs no memory."""
    start, count = int(keep.int().argmax()), int(keep.sum())
    return slice(start, start + count) if bool(keep[start : start + count].all()) else keep


def _nonzero_components(up: Tensor) -> Tensor:
    """Mask of components with a nonzero output; the first rows are sufficient for most files."""
    some = up[:16].any(0)
    return some if bool(some.all()) else up.any(0)


def merge_adapters(place: NamedLayer, adapters: Mapping[str, Any]) -> LoRAFactors:
    """The adapters of a layer as one pair of factors: block-diagonal, or stacked if all slices share `down`."""
    pairs = {name: _adapter_factors(adapter) for name, adapter in adapters.items()}
    return merge_factors(place, pairs, share_down(place, {name: p.down for name, p in pairs.items()}))


def share_down(place: NamedLayer, downs: Mapping[str, Tensor]) -> bool:
    """True if a layer has several slices, and all have the same `down`."""
    if len(place.sites) == 1:
        return False
    first = next(iter(downs.values()))
    return len(downs) == len(place.sites) and all(torch.equal(down, first) for down in downs.values())


def merge_factors(place: NamedLayer, pairs: Mapping[str, LoRAFactors], stacked: bool) -> LoRAFactors:
    """Merges the factors of a layer's sites, by name, into one pair for all rows; sites without factors become zero.

    Args:
        stacked: all share one `down`, which is kept; otherwise the components are concatenated.
    """
    first = next(iter(pairs.values()))
    if len(place.sites) == 1:
        up = torch.cat(first.up.chunk(2)[::-1]) if place.swapped else first.up
        return LoRAFactors(first.down, up, first.scaling)
    ups = {name: p.up if p.scaling == first.scaling else p.up * (p.scaling / first.scaling) for name, p in pairs.items()}
    if stacked:
        return LoRAFactors(first.down, torch.cat([ups[site.name] for site in place.sites]), first.scaling)
    order = [site.name for site in place.sites if site.name in pairs]
    ends = list(itertools.accumulate(pairs[n].down.shape[0] for n in order))
    columns = {n: slice(end - pairs[n].down.shape[0], end) for n, end in zip(order, ends, strict=True)}
    rows = []
    for site in place.sites:
        up = first.up.new_zeros(site.d_out, ends[-1])
        if site.name in pairs:
            up[:, columns[site.name]] = ups[site.name]
        rows.append(up)
    return LoRAFactors(torch.cat([pairs[n].down for n in order]), torch.cat(rows), first.scaling)


def _adapter_factors(adapter: Any) -> LoRAFactors:
    """An adapter's factors. A scale of 0 is written as B = 0, because tools interpret an alpha of 0 in two ways."""
    down, up = (t.detach() for t in adapter.pair())
    return LoRAFactors(down, up, adapter.scaling) if adapter.scaling else LoRAFactors(down, torch.zeros_like(up), 1.0)
