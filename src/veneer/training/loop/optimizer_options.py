"""Options of the optimizer and of the learning-rate schedule that the training commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options of the optimizer and of its schedule.

    Args:
        optimizer: `adamw`, `sgd`, `adafactor` or `came`; of bitsandbytes such as `adamw8bit`, `paged_adamw8bit` or `lion8bit`;
            of timm such as `lion`, `adan`, `lamb` or `muon`; `schedule_free_adamw`, which needs no schedule; `prodigy` or
            `dadapt_adam`, which set the learning rate themselves; or a class, package.module.Class.
        optimizer_args: arguments of the optimizer's class, such as `betas=0.9,0.99 eps=1e-6`.
        max_grad_norm: gradient clipping: largest L2 norm of the whole gradient; 0 disables it.
        cycles: number of cycles of the schedule `cosine_with_restarts`.
        power: exponent of the schedule `polynomial`; 1 is linear.
        min_lr_ratio: learning rate at the end of a decaying schedule, as a share of the peak, 0 to 1.
    """

    optimizer: str = "adamw"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    cycles: int = 1
    power: float = 1.0
    min_lr_ratio: float = 0.0
