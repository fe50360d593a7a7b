"""A LoRA out of a fine-tuned model: what it has that its base has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.functional.low_rank import cut
from veneer.injection import StateError
from veneer.injection.attachment.model_state import peek
from veneer.injection.composition.merge import host_tensors
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.select import select
from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower, towers_of

from .delta_weights import Change, CombineError, grouped
from .lora_from_deltas import Made, Outcome, made, place
from .rank_selection import Keep, as_keep


@torch.no_grad()
def extract(
    base: Any,
    tuned: Any,
    keep: Keep | int,
    *,
    where: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Outcome:
    """ΔW = W_tuned − W as a LoRA on the base: of each weight that differs the largest singular values.

    Args:
        base, tuned: two models, or pipelines with parts of the same names, of one architecture. What is attached to either does
            not count.
        keep: a rank, or a `Keep`, which may give each weight a rank of its own.
        where: selection; None for all linear layers and convolutions, of every part of a pipeline that both have.
        dtype: that the matrices are rounded to. name: of the attachment.
    Returns:
        The LoRA, which is on `base`, with the error of each weight. Its notes name what differs and is no part of it.
    Raises:
        CombineError: the models do not fit each other, or do not differ. StateError: something is merged into one of them.
        SelectionError: a pattern matches nothing.
    """
    ours, theirs = ({t.component: t for t in towers_of(m)} for m in (base, tuned))
    common = {c: (ours[c].module, theirs[c].module) for c in ours if c in theirs}
    if not common:
        message = f"extract: the base has {', '.join(ours)} and the tuned model {', '.join(theirs)}; nothing in common."
        raise CombineError(message, given=tuple(theirs), expected=tuple(ours))
    for component, modules in common.items():
        _refuse_unlike(component, *modules)
    found: list[Made] = []
    for site in _chosen([ours[c] for c in common], where):
        before, after = (base_tensor(m, site.path, site.param).detach() for m in common[site.component])
        if not before.is_floating_point() or not after.is_floating_point():
            message = f"extract: {site.name} is quantised. Load both models unquantised."
            raise CombineError(message, where=site.name, given=(before.dtype, after.dtype))
        rows = slice(*site.rows) if site.rows else slice(None)
        if not torch.equal(before[rows].double(), after[rows].double()):
            found.append(_one(site, after[rows].double() - before[rows].double(), as_keep(keep), dtype))
    notes = tuple(_others(common, found))
    return Outcome(place(base, found, "extracted", name), tuple(found), notes)


def _one(site: WeightSite, change: Tensor, keep: Keep, dtype: torch.dtype) -> Made:
    wanted = Change(matrix=grouped(change, site))
    u, s, vh = wanted.svd()
    return made(site, wanted, cut(u, s, vh, keep.count(s)), dtype)


def _chosen(towers: Sequence[Tower], where: str | Sequence[str] | None) -> list[WeightSite]:
    sites = [s for t in towers for s in t.sites if isinstance(s, WeightSite)]
    if where is None:
        return [s for s in sites if s.kind != "embedding" and not s.fused]
    main = frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)
    return select(sites, where, main)


def _refuse_unlike(component: str, before: nn.Module, after: nn.Module) -> None:
    for module in (before, after):
        ledger = peek(module)
        if ledger is not None and ledger.merged:
            raise StateError(
                f"extract: '{ledger.merged[-1].name}' is merged into {component or 'a model'}. Call its unmerge() first.",
                where=ledger.merged[-1].name,
                given="merged",
            )
    shapes = [{k: tuple(t.shape) for k, t in host_tensors(m)} for m in (before, after)]
    unlike = [k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)]
    if unlike:
        told = ", ".join(f"{k} {shapes[0].get(k)} and {shapes[1].get(k)}" for k in unlike[:4])
        message = f"extract: {component or 'the models'}: {len(unlike)} tensors are not alike: {told}."
        ours, theirs = ({k: each.get(k) for k in unlike} for each in shapes)
        raise CombineError(message, where=component, given=theirs, expected=ours)


def _others(common: Mapping[str, tuple[nn.Module, nn.Module]], found: Sequence[Made]) -> list[str]:
    """What differs beside the weights, or their rows, that the LoRA has."""
    covered: dict[tuple[str, str], list[slice]] = {}
    for m in found:
        rows = slice(*m.site.rows) if m.site.rows else slice(None)
        covered.setdefault((m.site.component, f"{m.site.path}.{m.site.param}".lstrip(".")), []).append(rows)
    told: dict[str, float] = {}
    for component, (ours, theirs) in common.items():
        after = dict(host_tensors(theirs))
        for key, tensor in host_tensors(ours):
            apart = after[key].double() - tensor.double()
            for rows in covered.get((component, key), ()):
                apart[rows] = 0
            if apart.any():
                size = float(torch.linalg.vector_norm(tensor.double()))
                told[f"{component}.{key}".lstrip(".")] = float(torch.linalg.vector_norm(apart)) / (size or 1.0)
    worst = sorted(told.items(), key=lambda item: -item[1])[:4]
    shown = ", ".join(f"{k} by {v:.1e}" for k, v in worst)
    return [f"not carried: {len(told)} other tensors differ (relative to their norm: {shown})"] if told else []
