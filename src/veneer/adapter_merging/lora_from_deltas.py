"""A LoRA from weight updates ΔW, with its approximation errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.formats._core.lora_config import LoRALayer, config_of
from veneer.injection import Attachment, attach, attachments, methods
from veneer.injection.attachment.deferred_init import defer_init
from veneer.injection.sites import WeightSite

from .delta_weights import CombineError, DeltaWeight


@dataclass(frozen=True)
class LoRAFactors:
    """LoRA factors of one weight.

    Args:
        down, up: in LoRA's layout. alpha: with (alpha / rank)·up down ≈ ΔW.
        norm: ‖ΔW‖. distance: ‖ΔW − (alpha / rank)·up down‖, with rounding to the dtype.
    """

    site: WeightSite
    down: Tensor
    up: Tensor
    alpha: float
    norm: float
    distance: float

    @property
    def rank(self) -> int:
        """Rank of all groups together."""
        return self.down.shape[1 if self.site.kind == "embedding" else 0]

    @property
    def error(self) -> float:
        """Relative error: distance / norm; 0 if both are 0."""
        return self.distance / self.norm if self.norm else float(self.distance > 0)


@dataclass(frozen=True)
class MergeResult:
    """A LoRA that was merged, extracted or resized.

    Args:
        attachment: the LoRA, on its model. factors: of each weight, with errors. notes: on what it does not cover.
    """

    attachment: Attachment
    factors: tuple[LoRAFactors, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative error ‖ΔW − LoRA‖ / ‖ΔW‖ over all weights together (Frobenius)."""
        norm = math.hypot(*(m.norm for m in self.factors))
        return math.hypot(*(m.distance for m in self.factors)) / norm if norm else 0.0

    def errors(self) -> dict[str, float]:
        """Relative error of each weight."""
        return {m.site.name: m.error for m in self.factors}

    def __str__(self) -> str:
        ranks = sorted({m.rank for m in self.factors})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"{len(self.factors)} weights, {rank}, relative error {self.error:.2e} (Frobenius)"]
        worst = sorted(self.factors, key=lambda m: -m.error)[:5]
        lines += [f"  {m.site.name}: rank {m.rank}, relative error {m.error:.2e}" for m in worst if self.error > 1e-5]
        return "\n".join([*lines, *self.notes])


def from_factors(site: WeightSite, pair: tuple[Tensor, Tensor, float], change: DeltaWeight) -> LoRAFactors:
    """Factors of a LoRA, without a copy."""
    down, up, scaling = pair
    rank = down.shape[1 if site.kind == "embedding" else 0]
    return LoRAFactors(site, down, up, scaling * rank, change.norm(), 0.0)


def lora_factors(site: WeightSite, change: DeltaWeight, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> LoRAFactors:
    """C (groups, rows, rank) and D (groups, rank, width) as LoRA matrices in `dtype`, with their distance to ΔW."""
    left, right = (t.to(dtype) for t in factors)
    rank = left.shape[0] * left.shape[2]
    distance = change.distance(left.double(), right.double())
    if site.kind == "embedding":
        return LoRAFactors(site, left[0], right[0].T.contiguous(), float(rank), change.norm(), distance)
    down = right.flatten(0, 1).reshape(rank, *site.weight_shape[1:])
    up = left.flatten(0, 1).reshape(site.d_out, -1, *(1 for _ in site.kernel))
    return LoRAFactors(site, down, up, float(rank), change.norm(), distance)


def attach_lora(
    model: Any, factors: Sequence[LoRAFactors], default_name: str, name: str | None, replaced: Sequence[Attachment] = ()
) -> Attachment:
    """Attaches a LoRA with these factors, and detaches the attachments that it replaces. Atomic.

    Args:
        default_name: used without `name`, with a number if an attachment has this name.
    """
    if not factors:
        raise CombineError("no weight changes; expected adapters or models with a ΔW other than 0.", given=0, expected=1)
    here = attachments(model)
    config = config_of({m.site.name: LoRALayer(m.site, m.rank, m.alpha) for m in factors})
    where = [f"name:{m.site.name}" for m in factors]
    with torch.random.fork_rng(devices=[]), defer_init():
        lora = attach(
            model, methods.get("lora")(**config), where=where, name=name or _unused_name(default_name, [a.name for a in here])
        )
    try:
        lora.load_state_dict(_state(factors))
        for other in reversed([a for a in here if a in replaced]):
            other.detach()
    except BaseException:
        lora.detach()
        raise
    return lora


def _state(factors: Sequence[LoRAFactors]) -> Mapping[str, Tensor]:
    return {f"{m.site.name}:{key}": tensor for m in factors for key, tensor in (("down", m.down), ("up", m.up))}


def _unused_name(name: str, taken: Sequence[str]) -> str:
    names = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(n for n in names if n not in taken)
