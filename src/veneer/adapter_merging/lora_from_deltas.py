"""From changes of weights to a LoRA on a model, and what was lost on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.formats._core.lora_config import Found, config_of
from veneer.injection import Attachment, attach, attachments, methods
from veneer.injection.sites import WeightSite

from .delta_weights import Change, CombineError


@dataclass(frozen=True)
class Made:
    """A LoRA for one weight.

    Args:
        down, up: as LoRA keeps them. alpha: of it, with ΔW = (alpha / rank)·up down.
        norm: ‖ΔW‖ of what was wanted. distance: ‖ΔW − made‖, rounding included.
    """

    site: WeightSite
    down: Tensor
    up: Tensor
    alpha: float
    norm: float
    distance: float

    @property
    def rank(self) -> int:
        """Of all groups together."""
        return self.down.shape[1 if self.site.kind == "embedding" else 0]

    @property
    def error(self) -> float:
        """distance / norm; 0 where both are 0."""
        return self.distance / self.norm if self.norm else float(self.distance > 0)


@dataclass(frozen=True)
class Outcome:
    """A LoRA that was made of others or of weights.

    Args:
        attachment: it, on its model. made: each weight's pair with its error. notes: what it does not have.
    """

    attachment: Attachment
    made: tuple[Made, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """‖ΔW − made‖ / ‖ΔW‖ over all weights together (Frobenius)."""
        norm = math.hypot(*(m.norm for m in self.made))
        return math.hypot(*(m.distance for m in self.made)) / norm if norm else 0.0

    def errors(self) -> dict[str, float]:
        """The same for each weight."""
        return {m.site.name: m.error for m in self.made}

    def __str__(self) -> str:
        ranks = sorted({m.rank for m in self.made})
        told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"{len(self.made)} weights, {told}, error {self.error:.2e} of the change (Frobenius)"]
        worst = sorted(self.made, key=lambda m: -m.error)[:5]
        lines += [f"  {m.site.name}: rank {m.rank}, error {m.error:.2e}" for m in worst if self.error > 1e-5]
        return "\n".join([*lines, *self.notes])


def as_it_is(site: WeightSite, pair: tuple[Tensor, Tensor, float], change: Change) -> Made:
    """The very tensors of a LoRA."""
    down, up, scaling = pair
    rank = down.shape[1 if site.kind == "embedding" else 0]
    return Made(site, down, up, scaling * rank, change.norm(), 0.0)


def made(site: WeightSite, change: Change, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> Made:
    """C (groups, rows, rank) and D (groups, rank, width) as LoRA's matrices in `dtype`, and how far they are from the change."""
    left, right = (t.to(dtype) for t in factors)
    rank = left.shape[0] * left.shape[2]
    distance = change.distance(left.double(), right.double())
    if site.kind == "embedding":
        return Made(site, left[0], right[0].T.contiguous(), float(rank), change.norm(), distance)
    down = right.flatten(0, 1).reshape(rank, *site.weight_shape[1:])
    up = left.flatten(0, 1).reshape(site.d_out, -1, *(1 for _ in site.kernel))
    return Made(site, down, up, float(rank), change.norm(), distance)


def place(model: Any, found: Sequence[Made], word: str, name: str | None, instead: Sequence[Attachment] = ()) -> Attachment:
    """Attach a LoRA with these matrices; it takes the place of others that are on the model. All or nothing.

    Args:
        word: its name, numbered if it is taken, where `name` is None.
    """
    if not found:
        raise CombineError("nothing changes any weight, so there is nothing to make a LoRA of.", given=0, expected=1)
    here = attachments(model)
    config = config_of({m.site.name: Found(m.site, m.rank, m.alpha) for m in found})
    where = [f"name:{m.site.name}" for m in found]
    with torch.random.fork_rng(devices=[]):
        lora = attach(model, methods.get("lora")(**config), where=where, name=name or _free(word, [a.name for a in here]))
    try:
        lora.load_state_dict(_state(found))
        for other in reversed([a for a in here if a in instead]):
            other.detach()
    except BaseException:
        lora.detach()
        raise
    return lora


def _state(found: Sequence[Made]) -> Mapping[str, Tensor]:
    return {f"{m.site.name}:{key}": tensor for m in found for key, tensor in (("down", m.down), ("up", m.up))}


def _free(word: str, taken: Sequence[str]) -> str:
    names = (word if i == 1 else f"{word}_{i}" for i in range(1, len(taken) + 2))
    return next(n for n in names if n not in taken)
