"""Merging of several adapters into one LoRA, and rank reduction of one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from veneer.functional.low_rank import truncate
from veneer.functional.ties_dare import drop, elected_mean, trim
from veneer.injection import Attachment
from veneer.injection.adapter_forms import PairAdapter
from veneer.injection.errors import OptionError
from veneer.injection.select import select
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of

from .delta_weights import CombineError, DeltaWeight, check_mergeable, delta_weight_of, unscaled_factors, weighted_sum
from .lora_from_deltas import LoRAFactors, MergeResult, attach_lora, from_factors, lora_factors
from .rank_selection import RankSelection, to_rank_selection

How = Literal["sum", "svd", "ties", "dare", "dare_ties"]
Weight = float | Mapping[str, float]
DENSITY = {"ties": 0.2, "dare": 0.1, "dare_ties": 0.1}
"""Densities that the papers use."""


@dataclass(frozen=True)
class SourceDelta:
    """ΔW of one adapter at one weight. `number`: index of the adapter. `pair`: its own factors, if its weight and scale are 1."""

    number: int
    change: DeltaWeight
    weight: float
    pair: tuple[Tensor, Tensor, float] | None


@torch.no_grad()
def combine(
    model: Any,
    sources: Sequence[Attachment],
    weights: Sequence[Weight] | None = None,
    *,
    how: How = "sum",
    keep: RankSelection | int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> MergeResult:
    """Merges several adapters into one LoRA, ΔW = Σ w·ΔW, which replaces them on the model. Atomic.

    Every source counts with its own `scale`, as on the model: LoRA by its factors, any other method with a weight form by
    weight(W) − W. If only one adapter acts on a weight, at weight 1 and scale 1, and its rank need not be reduced, its tensors
    are copied bitwise.

    Args:
        model: the module or pipeline that the LoRA is attached to.
        sources: attachments, on `model` or on another model of the same sites. Those on `model` are detached.
        weights: weight of each source, may be negative (default: 1 each). Instead of a number, a mapping from `where` patterns to
            numbers, of which the last matching one counts; other sites have weight 1.
        how: `sum`: the exact sum, ranks add up; low-rank sources only. `svd`: the sum, reduced to a rank. `ties`: the largest
            entries of each ΔW, sign election, and the mean of w·ΔW over the entries with the elected sign. `dare`: random entries
            dropped, the others rescaled, then the sum. `dare_ties`: dropped as in `dare`, then elected as in `ties`. The last
            three are reduced to a rank.
        keep: a rank, or a `RankSelection` (default: the largest rank among the sources). Not for `sum`.
        density: fraction of the entries that `ties` (default 0.2) or `dare` (default 0.1) keeps; above 0, up to 1.
        seed: of `dare`.
        dtype: the matrices are rounded to this dtype, in which they will be saved.
        name: of the new attachment.
    Returns:
        The LoRA with the error of each weight, relative to the sum, or to the unreduced result of `ties` and `dare`.
    Raises:
        CombineError: a source changes more than weights, or has no low rank where one is needed. StateError: one is merged.
        SelectionError: a pattern matches nothing. ValueError: an option is out of range or not supported by this `how`.
    Source: Yadav et al., TIES-Merging, NeurIPS 2023; Yu et al., DARE, ICML 2024. `ties` trims each weight separately and takes w
    in the mean, as peft's `ties_svd`, where the paper trims the whole model at once and scales all by one λ; a negative w negates
    its ΔW before the election, where peft multiplies after it. `sum` is peft's `cat`; peft's `linear` adds A's and B's
    separately, which is another ΔW, and has no counterpart here.
    """
    _check(sources, weights, how, keep, density)
    kept = DENSITY.get(how, 1.0) if density is None else density
    sites, site_weights = _sites(sources), _site_weights(model, sources, weights)
    rank = None if how == "sum" else to_rank_selection(keep if keep is not None else _largest_rank(sources))
    found: list[LoRAFactors] = []
    for site_name, site in sites.items():
        deltas = [
            _source(i, a, site_name, site_weights[i].get(site_name, 1.0)) for i, a in enumerate(sources) if site_name in a.parts
        ]
        deltas = [s for s in deltas if s.weight]
        if deltas:
            found.append(_merge_site(site, deltas, how, rank, kept, seed, dtype))
    attachment = attach_lora(model, found, "combined", name, sources)
    attachment.provenance = {k: v for a in sources for k, v in a.provenance.items()}
    return MergeResult(attachment, tuple(found))


def resize(
    model: Any, source: Attachment, keep: RankSelection | int, *, dtype: torch.dtype = torch.float32, name: str | None = None
) -> MergeResult:
    """Reduces an adapter to a LoRA of a lower rank, which replaces it: the largest singular values of each ΔW are kept.

    The rank is an upper limit: weights of that rank or a lower one are not changed.

    Args:
        model: the model of the attachment. source: a LoRA, or any other method with a weight form.
        keep: a rank, or a `RankSelection`. dtype, name: as in `combine`.
    Raises:
        CombineError: the adapter changes more than weights.
        StateError: it is merged.
        ValueError: `keep` is out of range.
    """
    return combine(model, [source], how="svd", keep=keep, dtype=dtype, name=name)


def _check(sources: Sequence[Attachment], weights: Any, how: str, keep: Any, density: float | None) -> None:
    if how not in get_args(How):
        message = f"combine: how is {how!r}; expected one of {', '.join(get_args(How))}"
        raise OptionError(message, option="how", method="combine", given=how, expected=get_args(How))
    if not sources or (weights is not None and len(weights) != len(sources)):
        given, expected = len(weights or ()), len(sources)
        message = f"combine: {given} weights; expected one for each of the {expected} adapters"
        raise OptionError(message, option="weights", method="combine", given=given, expected=expected)
    if how == "sum" and keep is not None:
        message = "combine: how='sum' does not reduce the rank; use how='svd' for a rank"
        raise OptionError(message, option="keep", method="combine", given=keep, expected=None)
    if density is not None and (how not in DENSITY or not 0 < density <= 1):
        message = f"combine: density is {density} with how={how!r}; expected above 0 and up to 1, with {', '.join(DENSITY)}"
        raise OptionError(message, option="density", method="combine", given=density, expected=tuple(DENSITY))
    for source in sources:
        check_mergeable(source)


def _sites(sources: Sequence[Attachment]) -> dict[str, WeightSite]:
    """All weights that a source changes.

    Raises:
        CombineError: two sources have another shape of the same weight.
    """
    found: dict[str, Any] = {}
    for source in sources:
        for name, (site, _) in source.parts.items():
            other = found.setdefault(name, site)
            if getattr(other, "weight_shape", None) != getattr(site, "weight_shape", None):
                given, expected = getattr(site, "weight_shape", None), getattr(other, "weight_shape", None)
                message = (
                    f"{name}: shape {given} in '{source.name}', {expected} in another adapter; expected adapters of one model."
                )
                raise CombineError(message, where=name, given=given, expected=expected)
    return found


def _site_weights(model: Any, sources: Sequence[Attachment], weights: Sequence[Weight] | None) -> list[dict[str, float]]:
    """For each source the weight at the sites that its patterns match."""
    towers = towers_of(model)
    main = frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)
    found: list[dict[str, float]] = []
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        sites = [site for site, _ in source.parts.values()]
        by_pattern = weight.items() if isinstance(weight, Mapping) else [("name:*", weight)]
        found.append({s.name: float(w) for pattern, w in by_pattern for s in select(sites, pattern, main)})
    return found


def _source(number: int, attachment: Attachment, name: str, weight: float) -> SourceDelta:
    pair = unscaled_factors(attachment.parts[name][1]) if weight == 1 else None
    return SourceDelta(number, delta_weight_of(attachment, name), weight, pair)


def _largest_rank(sources: Sequence[Attachment]) -> int:
    parts: list[tuple[Any, Any]] = [part for a in sources for part in a.parts.values()]
    pairs = [(site, adapter.pair()[1]) for site, adapter in parts if isinstance(adapter, PairAdapter)]
    if not pairs:
        name = sources[0].method.name
        message = f"{name} has no rank to use for the LoRA; set a rank."
        raise CombineError(message, where="keep", given=name)
    return max(int(up.shape[1]) * site.groups for site, up in pairs)


def _merge_site(
    site: WeightSite,
    deltas: list[SourceDelta],
    how: How,
    keep: RankSelection | None,
    density: float,
    seed: int,
    dtype: torch.dtype,
) -> LoRAFactors:
    """The LoRA of one weight."""
    target = _target(site, deltas, how, density, seed)
    pair = deltas[0].pair if len(deltas) == 1 and how in ("sum", "svd") else None
    if pair is not None and (keep is None or keep.holds(pair[1].shape[1] * site.groups)) and _exact(pair, dtype):
        return from_factors(site, pair, target)
    if keep is None:
        if target.factors is None:
            message = f"{site.name}: how='sum' needs low-rank adapters, but ΔW has full rank. Use how='svd' and a rank."
            raise CombineError(message, where=site.name, given="sum", expected="svd")
        return lora_factors(site, target, target.factors, dtype)
    u, s, vh = target.svd()
    return lora_factors(site, target, truncate(u, s, vh, keep.count(s)), dtype)


def _exact(pair: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> bool:
    return all(torch.equal(t.to(dtype).to(t.dtype), t) for t in pair[:2])


def _target(site: WeightSite, deltas: list[SourceDelta], how: How, density: float, seed: int) -> DeltaWeight:
    """The exact ΔW of a site, before rank reduction."""
    weights = [s.weight for s in deltas]
    if how in ("sum", "svd"):
        return weighted_sum([s.change for s in deltas], weights)
    if how == "ties":
        changes = [trim(s.change.dense(), density) for s in deltas]
    else:
        changes = [drop(s.change.dense(), density, _generator(seed, s.number, site.name)) for s in deltas]
    if how == "dare":
        return weighted_sum([DeltaWeight(matrix=c) for c in changes], weights)
    return DeltaWeight(matrix=elected_mean(changes, weights))


def _generator(seed: int, number: int, name: str) -> torch.Generator:
    """Generator of one source at one weight, independent of the other sources."""
    digest = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
