"""Extraction of a LoRA from a fine-tuned model and its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.functional.low_rank import truncate
from veneer.injection import StateError
from veneer.injection.attachment.model_state import find_model_state
from veneer.injection.composition.merge import host_tensors
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.select import select
from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower, towers_of

from .delta_weights import CombineError, DeltaWeight, grouped
from .lora_from_deltas import LoRAFactors, MergeResult, attach_lora, lora_factors
from .rank_selection import RankSelection, to_rank_selection


@torch.no_grad()
def extract(
    base: Any,
    tuned: Any,
    keep: RankSelection | int,
    *,
    where: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> MergeResult:
    """Approximates ΔW = W_tuned − W by a LoRA on the base, from the largest singular values of each weight that differs.

    Args:
        base, tuned: two models, or pipelines with components of the same names, of one architecture. Attached adapters are
            ignored.
        keep: a rank, or a `RankSelection`, which may select another rank for each weight.
        where: selection (default: all linear layers and convolutions of the common components).
        dtype: the matrices are rounded to this dtype. name: of the attachment.
    Returns:
        The LoRA, attached to `base`, with the error of each weight. Its notes list other differences, which it does not cover.
    Raises:
        CombineError: the models have different shapes, or are equal. StateError: an adapter is merged into one of them.
        SelectionError: a pattern matches nothing.
    """
    ours, theirs = ({t.component: t for t in towers_of(m)} for m in (base, tuned))
    common = {c: (ours[c].module, theirs[c].module) for c in ours if c in theirs}
    if not common:
        message = f"extract: the tuned model has {', '.join(theirs)}; expected some of the base's components {', '.join(ours)}."
        raise CombineError(message, given=tuple(theirs), expected=tuple(ours))
    for component, modules in common.items():
        _check_compatible(component, *modules)
    found: list[LoRAFactors] = []
    for site in _selected_sites([ours[c] for c in common], where):
        before, after = (base_tensor(m, site.path, site.param).detach() for m in common[site.component])
        if not before.is_floating_point() or not after.is_floating_point():
            message = f"extract: {site.name} is quantized. Load both models unquantized."
            raise CombineError(message, where=site.name, given=(before.dtype, after.dtype))
        rows = slice(*site.rows) if site.rows else slice(None)
        if not torch.equal(before[rows].double(), after[rows].double()):
            found.append(_extract_site(site, after[rows].double() - before[rows].double(), to_rank_selection(keep), dtype))
    notes = tuple(_other_differences(common, found))
    return MergeResult(attach_lora(base, found, "extracted", name), tuple(found), notes)


def _extract_site(site: WeightSite, change: Tensor, keep: RankSelection, dtype: torch.dtype) -> LoRAFactors:
    target = DeltaWeight(matrix=grouped(change, site))
    u, s, vh = target.svd()
    return lora_factors(site, target, truncate(u, s, vh, keep.count(s)), dtype)


def _selected_sites(towers: Sequence[Tower], where: str | Sequence[str] | None) -> list[WeightSite]:
    sites = [s for t in towers for s in t.sites if isinstance(s, WeightSite)]
    if where is None:
        return [s for s in sites if s.kind != "embedding" and not s.fused]
    main = frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)
    return select(sites, where, main)


def _check_compatible(component: str, before: nn.Module, after: nn.Module) -> None:
    for module in (before, after):
        tower_state = find_model_state(module)
        if tower_state is not None and tower_state.merged:
            raise StateError(
                f"extract: '{tower_state.merged[-1].name}' is merged into {component or 'a model'}. Call its unmerge() first.",
                where=tower_state.merged[-1].name,
                given="merged",
            )
    shapes = [{k: tuple(t.shape) for k, t in host_tensors(m)} for m in (before, after)]
    different = [k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)]
    if different:
        listing = ", ".join(f"{k} {shapes[0].get(k)} and {shapes[1].get(k)}" for k in different[:4])
        message = f"extract: {component or 'the models'}: {len(different)} tensors have different shapes: {listing}."
        ours, theirs = ({k: each.get(k) for k in different} for each in shapes)
        raise CombineError(message, where=component, given=theirs, expected=ours)


def _other_differences(common: Mapping[str, tuple[nn.Module, nn.Module]], found: Sequence[LoRAFactors]) -> list[str]:
    """A note on tensors, or rows of weights, that differ but are not covered by the LoRA."""
    covered: dict[tuple[str, str], list[slice]] = {}
    for m in found:
        rows = slice(*m.site.rows) if m.site.rows else slice(None)
        covered.setdefault((m.site.component, f"{m.site.path}.{m.site.param}".lstrip(".")), []).append(rows)
    differences: dict[str, float] = {}
    for component, (ours, theirs) in common.items():
        after = dict(host_tensors(theirs))
        for key, tensor in host_tensors(ours):
            difference = after[key].double() - tensor.double()
            for rows in covered.get((component, key), ()):
                difference[rows] = 0
            if difference.any():
                size = float(torch.linalg.vector_norm(tensor.double()))
                differences[f"{component}.{key}".lstrip(".")] = float(torch.linalg.vector_norm(difference)) / (size or 1.0)
    worst = sorted(differences.items(), key=lambda item: -item[1])[:4]
    listing = ", ".join(f"{k} by {v:.1e}" for k, v in worst)
    count = len(differences)
    return [f"not included: {count} other tensors differ (relative to their norm: {listing})"] if differences else []
