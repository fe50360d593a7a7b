"""One low-rank pair for a whole fused projection, or one for each of its slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.injection import LoadError
from veneer.injection.sites import WeightSite

from .._io.reader import File
from .kohya import Place


class Pair(NamedTuple):
    """A low-rank change s·B A of one module's rows: `down` (rank, d_in[, k, k]), `up` (d_out, rank[, 1, 1]), s."""

    down: Tensor
    up: Tensor
    scaling: float


def split(file: File, name: str, place: Place, pair: Pair) -> list[tuple[WeightSite, Pair]]:
    """The part of each site: its rows of `up`, and of the components only those that touch them.

    Raises:
        LoadError: the rows are not those of the slices.
    """
    down, up, scaling = pair
    if place.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    if len(place.sites) == 1:
        return [(place.sites[0], Pair(down, up, scaling))]
    rows = [site.d_out for site in place.sites]
    if down.ndim != 2 or up.shape != (sum(rows), down.shape[0]):
        raise LoadError(
            f"{file.path}: misshapen: {name} is up {tuple(up.shape)} and down {tuple(down.shape)}, for {sum(rows)} rows. It was "
            "made for another base.",
            file=file.path,
            where=name,
            misshapen={"up": (tuple(up.shape), (sum(rows), down.shape[0]))},
        )
    slices = [(site, part, _touching(part)) for site, part in zip(place.sites, up.split(rows), strict=True)]
    if not any(keep.any() for _, _, keep in slices):
        return [(site, Pair(down, part, scaling)) for site, part, _ in slices]
    return [
        (site, Pair(down, part, scaling) if keep.all() else Pair(down[keep], part[:, keep], scaling))
        for site, part, keep in slices
        if keep.any()
    ]


def _touching(up: Tensor) -> Tensor:
    """Which components have an output that is not 0; a few rows tell it of most files."""
    some = up[:16].any(0)
    return some if bool(some.all()) else up.any(0)


def joined(place: Place, adapters: Mapping[str, Any]) -> Pair:
    """The adapters of a place as one pair: block-diagonal, or stacked where all slices read the same components."""
    pairs = {name: _of(adapter) for name, adapter in adapters.items()}
    return together(place, pairs, alike(place, {name: p.down for name, p in pairs.items()}))


def alike(place: Place, downs: Mapping[str, Tensor]) -> bool:
    """True if every slice of a place reads the same components."""
    first = next(iter(downs.values()))
    return len(downs) == len(place.sites) and all(torch.equal(down, first) for down in downs.values())


def together(place: Place, pairs: Mapping[str, Pair], stacked: bool) -> Pair:
    """The pairs of a place's sites, by name, as one of all its rows; those of sites without a pair are zero.

    Args:
        stacked: all have one `down`, which is kept; else the components of one are after those of another.
    """
    first = next(iter(pairs.values()))
    if len(place.sites) == 1:
        up = torch.cat(first.up.chunk(2)[::-1]) if place.swapped else first.up
        return Pair(first.down, up, first.scaling)
    ups = {name: p.up if p.scaling == first.scaling else p.up * (p.scaling / first.scaling) for name, p in pairs.items()}
    if stacked:
        return Pair(first.down, torch.cat([ups[site.name] for site in place.sites]), first.scaling)
    order = [site.name for site in place.sites if site.name in pairs]
    wide = dict(zip(order, torch.block_diag(*(torch.ones(1, pairs[n].down.shape[0]) for n in order)), strict=True))
    rows = []
    for site in place.sites:
        up = first.up.new_zeros(site.d_out, sum(pairs[n].down.shape[0] for n in order))
        if site.name in pairs:
            up[:, wide[site.name].bool()] = ups[site.name]
        rows.append(up)
    return Pair(torch.cat([pairs[n].down for n in order]), torch.cat(rows), first.scaling)


def _of(adapter: Any) -> Pair:
    """An adapter's own pair. A scale of 0 is written as B = 0, because an alpha of 0 is read in two ways."""
    down, up = (t.detach() for t in adapter.pair())
    return Pair(down, up, adapter.scaling) if adapter.scaling else Pair(down, torch.zeros_like(up), 1.0)
