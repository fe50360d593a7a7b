"""Learning-rate schedules: linear warm-up, then constant, cosine or linear."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}
"""Schedule name to factor; `progress` runs from 0 (after warm-up) to 1 (after the last step)."""


def rate_factor(schedule: str, step: int, warmup: int, steps: int) -> float:
    """Learning-rate factor of step `step` (0-based): (step + 1) / warmup in the warm-up, then the schedule.

    Args:
        schedule: name in `SCHEDULES`. `warmup`, `steps`: optimizer steps of the warm-up, and of the whole run.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return SCHEDULES[schedule](min(1.0, progress))
