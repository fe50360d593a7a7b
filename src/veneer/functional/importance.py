"""Importance of parameters for the loss, smoothed over steps, and budget schedules for pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@torch.no_grad()
def update_importance(weight: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> None:
    """Ī ← β1·Ī + (1 − β1)·I and Ū ← β2·Ū + (1 − β2)·|I − Ī| in place, with I = |w · ∂L/∂w|.

    Does nothing for a parameter without a gradient.

    Args:
        weight: w, with its gradient. `sensitivity`, `uncertainty`: Ī and Ū, of its shape.
    Source: Zhang et al., AdaLoRA, ICLR 2023, equations 8 to 10.
    """
    if weight.grad is None:
        return
    now = (weight * weight.grad).abs()
    sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
    uncertainty.mul_(beta2).add_((now - sensitivity).abs_(), alpha=1 - beta2)


def cubic_budget(step: int, start: int, end: int, first: int, last: int) -> int:
    """b(t) = b_T + (b_0 − b_T)·(1 − (t − t_0) / (t_1 − t_0))³, rounded down: b_0 until `start`, b_T from `end` on.

    Args:
        step: t. `start`, `end`: t_0 and t_1. `first`, `last`: b_0 and b_T.
    Source: Zhu and Gupta 2017 for sparsity; Zhang et al., AdaLoRA, ICLR 2023, section 3.3.
    """
    if step >= end:
        return last
    remaining = 1 - max(0, step - start) / (end - start) if end > start else 1
    return int(last + (first - last) * remaining**3)


@dataclass(frozen=True)
class PruningSchedule:
    """When the parts of a model are pruned in a run, and how many remain.

    Args:
        warmup: fraction of the steps before pruning starts. `final`: fraction of the steps after it has ended.
        every: steps between two prunings. `steps`: of the run.
    """

    warmup: float
    final: float
    every: int
    steps: int

    @property
    def start(self) -> int:
        """Step after which pruning may begin."""
        return round(self.warmup * self.steps)

    @property
    def end(self) -> int:
        """Step of the last pruning."""
        return max(1, self.steps - round(self.final * self.steps))

    def measures(self, step: int) -> bool:
        """True if the importance is recorded after this step."""
        return step <= max(1, self.end - 1)

    def prunes(self, step: int) -> bool:
        """True if the remaining parts are chosen again after this step."""
        return step == self.end or (self.start < step < self.end and step % self.every == 0)

    def budget(self, step: int, first: int, last: int) -> int:
        """Number of parts that remain, from `first` to `last`."""
        return cubic_budget(step, self.start, self.end, first, last)


def largest_mask(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of `scores`, (n,); ties go to the earlier ones, so that the count is exact."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept
