"""Learning-rate schedules: linear warm-up, then a function of the progress from 0 (after warm-up) to 1 (after the last step)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule.

    Args:
        name: key of `SCHEDULES`.
        warmup, steps: optimizer steps of the warm-up, and of the whole run.
        cycles: number of cosine cycles of `cosine_with_restarts`.
        power: exponent of `polynomial`.
        min_lr_ratio: factor at the end of a decay, in place of 0.
    """

    name: str
    warmup: int
    steps: int
    cycles: int = 1
    power: float = 1.0
    min_lr_ratio: float = 0.0

    def factor(self, step: int) -> float:
        """Learning-rate factor of step `step` (0-based): `(step + 1) / warmup` in the warm-up, then the schedule.

        After the warm-up, with `p = (step - warmup) / (steps - warmup)` and the function `f` of the schedule, the factor is
        `min_lr_ratio + (1 - min_lr_ratio) f(p)`.

        Source: the functions of diffusers.optimization have the same values after the warm-up, which starts there at 0 instead of
        1 / warmup. `min_lr_ratio` is transformers' `min_lr_rate`.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * SCHEDULES[self.name](progress, self)


def constant(progress: float, schedule: Schedule) -> float:
    """1."""
    return 1.0


def linear(progress: float, schedule: Schedule) -> float:
    """1 - p."""
    return 1.0 - progress


def cosine(progress: float, schedule: Schedule) -> float:
    """(1 + cos(π p)) / 2.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5, with one cycle.
    """
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_with_restarts(progress: float, schedule: Schedule) -> float:
    """(1 + cos(π (cycles · p mod 1))) / 2, and 0 at p = 1.

    Source: SGDR, equation 5, with cycles of equal length; diffusers' `get_cosine_with_hard_restarts_schedule_with_warmup`.
    """
    return 0.0 if progress >= 1.0 else cosine(schedule.cycles * progress % 1.0, schedule)


def polynomial(progress: float, schedule: Schedule) -> float:
    """(1 - p)^power.

    Source: diffusers' `get_polynomial_decay_schedule_with_warmup`, whose `lr_end / lr` is `min_lr_ratio`.
    """
    return (1.0 - progress) ** schedule.power


def rex(progress: float, schedule: Schedule) -> float:
    """(1 - p) / (1/2 + (1 - p) / 2).

    Source: Chen, Wolfe and Kyrillidis, REX: Revisiting Budgeted Training with an Improved Schedule, 2022, section 4.
    """
    return (1.0 - progress) / (0.5 + 0.5 * (1.0 - progress))


SCHEDULES: dict[str, Callable[[float, Schedule], float]] = {
    "constant": constant,
    "constant_with_warmup": constant,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "linear": linear,
    "rex": rex,
}
"""Schedule name to its function of the progress."""
CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that do not depend on the number of steps."""
