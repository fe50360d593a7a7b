"""Options of the optimizer and of the learning-rate schedule that the training commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options of the optimizer and of its schedule.

    Args:
        optimizer: `adamw`, `sgd`, `adafactor`, `prodigy`, `schedule_free_adamw` (also `_radam`, `_sgd`), `came`, `dadapt_adam`,
            `adamw8bit`, `paged_adamw8bit`, `lion8bit` and others of bitsandbytes, any name of timm such as `lion`, `adan`,
            `nadamw`, `lamb`, `muon`, `adopt`, or the path of a class, package.module.Class.
        optimizer_args: arguments of the optimizer's class, such as `betas=0.9,0.99`.
        max_grad_norm: gradient clipping: largest L2 norm of the gradient; 0 disables clipping.
        cycles: number of cycles of the schedule `cosine_with_restarts`.
        power: exponent of the schedule `polynomial`.
        min_lr_ratio: share of the learning rate at which a decaying schedule ends, 0 to 1.
    """

    optimizer: str = "adamw"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    cycles: int = 1
    power: float = 1.0
    min_lr_ratio: float = 0.0
