"""Several adapters as one LoRA; and one with another rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from veneer.functional.low_rank import cut
from veneer.functional.task_vectors import drop, elected_mean, trim
from veneer.injection import Attachment
from veneer.injection.errors import OptionError
from veneer.injection.select import select
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of

from .delta_weights import Change, CombineError, added, change_of, pair_as_it_is, refuse
from .lora_from_deltas import Made, Outcome, as_it_is, made, place
from .rank_selection import Keep, as_keep

How = Literal["sum", "svd", "ties", "dare", "dare_ties"]
Weight = float | Mapping[str, float]
DENSITY = {"ties": 0.2, "dare": 0.1, "dare_ties": 0.1}
"""Shares that the papers use."""


@dataclass(frozen=True)
class Source:
    """What one adapter does to one weight: `number` is its place among all. `pair`: its own tensors, if nothing scales them."""

    number: int
    change: Change
    weight: float
    pair: tuple[Tensor, Tensor, float] | None


@torch.no_grad()
def combine(
    model: Any,
    sources: Sequence[Attachment],
    weights: Sequence[Weight] | None = None,
    *,
    how: How = "sum",
    keep: Keep | int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Outcome:
    """ΔW = Σ w·ΔW of several adapters as one LoRA, which takes their place on the model. All or nothing.

    Every source acts at its own `scale`, as it does on the model: LoRA by its factors, any other method with a weight form by
    weight(W) − W. Where only one acts, at weight 1 and scale 1, and its rank may stay, its tensors are taken as they are.

    Args:
        model: the module or pipeline that the LoRA goes on.
        sources: attachments, on `model` or on another of the same sites. Those on `model` are detached.
        weights: one for each, negative ones too; None for 1 each. In the place of a number a mapping from patterns of `where` to
            numbers, of which the last that matches counts; sites that none matches have 1.
        how: `sum`, the exact sum: ranks side by side, of low-rank sources only. `svd`: the sum, cut to a rank. `ties`: of each
            ΔW the largest numbers, signs elected, and the mean of w·ΔW over those that have the elected sign; `dare`: numbers
            dropped at random, the others scaled up, then the sum; `dare_ties`: dropped so, then elected. The last three are cut.
        keep: a rank, or a `Keep`; None for the largest rank among the sources. Not for `sum`.
        density: share of the numbers that `ties` keeps (0.2 if left out), or that `dare` does (0.1); above 0, up to 1.
        seed: of `dare`.
        dtype: that the matrices are rounded to, as they will be saved.
        name: of the new attachment.
    Returns:
        The LoRA with the error of each weight against what was to be made: against the sum, or the outcome of `ties` and `dare`.
    Raises:
        CombineError: a source is no change of weights alone, or not of low rank where that is needed. StateError: one is merged.
        SelectionError: a pattern matches nothing. ValueError: an option that is out of range or not for this `how`.
    Source: Yadav et al., TIES-Merging, NeurIPS 2023; Yu et al., DARE, ICML 2024. `ties` trims each weight by itself and takes w
    in the mean, as peft's `ties_svd`, where the paper trims the whole model at once and scales all by one λ; a negative w turns
    its ΔW before the election, where peft multiplies after it. `sum` is peft's `cat`; peft's `linear` adds A's and B's apart,
    which is another ΔW, and has no equal here.
    """
    _check(sources, weights, how, keep, density)
    share = DENSITY.get(how, 1.0) if density is None else density
    sites, shares = _sites(sources), _shares(model, sources, weights)
    rank = None if how == "sum" else as_keep(keep if keep is not None else _largest_rank(sources))
    found: list[Made] = []
    for site_name, site in sites.items():
        acting = [_source(i, a, site_name, shares[i].get(site_name, 1.0)) for i, a in enumerate(sources) if site_name in a.parts]
        acting = [s for s in acting if s.weight]
        if acting:
            found.append(_one(site, acting, how, rank, share, seed, dtype))
    attachment = place(model, found, "combined", name, sources)
    attachment.provenance = {k: v for a in sources for k, v in a.provenance.items()}
    return Outcome(attachment, tuple(found))


def resize(
    model: Any, source: Attachment, keep: Keep | int, *, dtype: torch.dtype = torch.float32, name: str | None = None
) -> Outcome:
    """The same change at another rank, as a LoRA in the place of the attachment: of each ΔW the largest singular values.

    A rank is an upper limit: weights of that rank or a lower one stay as they are, and none is raised.

    Args:
        model: that the attachment is on. source: a LoRA, or any other method with a weight form.
        keep: a rank, or a `Keep`. dtype, name: as in `combine`.
    Raises:
        As `combine`.
    """
    return combine(model, [source], how="svd", keep=keep, dtype=dtype, name=name)


def _check(sources: Sequence[Attachment], weights: Any, how: str, keep: Any, density: float | None) -> None:
    if how not in get_args(How):
        message = f"combine: how is {how!r}; expected one of {', '.join(get_args(How))}"
        raise OptionError(message, option="how", method="combine", given=how, expected=get_args(How))
    if not sources or (weights is not None and len(weights) != len(sources)):
        given, expected = len(weights or ()), len(sources)
        message = f"combine: {expected} adapters and {given} weights; give one weight for each"
        raise OptionError(message, option="weights", method="combine", given=given, expected=expected)
    if how == "sum" and keep is not None:
        message = "combine: how='sum' keeps all ranks; give how='svd' to cut the sum to a rank"
        raise OptionError(message, option="keep", method="combine", given=keep, expected=None)
    if density is not None and (how not in DENSITY or not 0 < density <= 1):
        message = f"combine: density is {density} with how={how!r}; it is for {', '.join(DENSITY)}, above 0 and up to 1"
        raise OptionError(message, option="density", method="combine", given=density, expected=tuple(DENSITY))
    for source in sources:
        refuse(source)


def _sites(sources: Sequence[Attachment]) -> dict[str, WeightSite]:
    """Every weight that a source changes.

    Raises:
        CombineError: two of them are of models that do not fit.
    """
    found: dict[str, Any] = {}
    for source in sources:
        for name, (site, _) in source.parts.items():
            other = found.setdefault(name, site)
            if getattr(other, "weight_shape", None) != getattr(site, "weight_shape", None):
                given, expected = getattr(site, "weight_shape", None), getattr(other, "weight_shape", None)
                message = f"{name}: {expected} in one adapter, {given} in '{source.name}'."
                raise CombineError(message, where=name, given=given, expected=expected)
    return found


def _shares(model: Any, sources: Sequence[Attachment], weights: Sequence[Weight] | None) -> list[dict[str, float]]:
    """For each source the weight at its sites, without those of 1."""
    towers = towers_of(model)
    main = frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)
    found: list[dict[str, float]] = []
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        sites = [site for site, _ in source.parts.values()]
        by_pattern = weight.items() if isinstance(weight, Mapping) else [("name:*", weight)]
        found.append({s.name: float(w) for pattern, w in by_pattern for s in select(sites, pattern, main)})
    return found


def _source(number: int, attachment: Attachment, name: str, weight: float) -> Source:
    pair = pair_as_it_is(attachment.parts[name][1]) if weight == 1 else None
    return Source(number, change_of(attachment, name), weight, pair)


def _largest_rank(sources: Sequence[Attachment]) -> int:
    parts: list[tuple[Any, Any]] = [part for a in sources for part in a.parts.values()]
    pairs = [(site, adapter.pair()[1]) for site, adapter in parts if hasattr(adapter, "factors")]
    if not pairs:
        name = sources[0].method.name
        message = f"{name} has no rank that a LoRA could have; give keep, such as a rank."
        raise CombineError(message, where="keep", given=name)
    return max(int(up.shape[1]) * site.groups for site, up in pairs)


def _one(
    site: WeightSite, acting: list[Source], how: How, keep: Keep | None, density: float, seed: int, dtype: torch.dtype
) -> Made:
    """The LoRA of one weight."""
    wanted = _wanted(site, acting, how, density, seed)
    pair = acting[0].pair if len(acting) == 1 and how in ("sum", "svd") else None
    if pair is not None and (keep is None or keep.holds(pair[1].shape[1] * site.groups)) and _exact(pair, dtype):
        return as_it_is(site, pair, wanted)
    if keep is None:
        if wanted.factors is None:
            message = f"{site.name}: how='sum' is exact, and a change there is of full rank. Give how='svd' and a rank."
            raise CombineError(message, where=site.name, given="sum", expected="svd")
        return made(site, wanted, wanted.factors, dtype)
    u, s, vh = wanted.svd()
    return made(site, wanted, cut(u, s, vh, keep.count(s)), dtype)


def _exact(pair: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> bool:
    return all(torch.equal(t.to(dtype).to(t.dtype), t) for t in pair[:2])


def _wanted(site: WeightSite, acting: list[Source], how: How, density: float, seed: int) -> Change:
    """What the weight's change is to be."""
    weights = [s.weight for s in acting]
    if how in ("sum", "svd"):
        return added([s.change for s in acting], weights)
    if how == "ties":
        changes = [trim(s.change.dense(), density) for s in acting]
    else:
        changes = [drop(s.change.dense(), density, _draws(seed, s.number, site.name)) for s in acting]
    if how == "dare":
        return added([Change(matrix=c) for c in changes], weights)
    return Change(matrix=elected_mean(changes, weights))


def _draws(seed: int, number: int, name: str) -> torch.Generator:
    """Of one source at one weight, whatever else is combined."""
    digest = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
