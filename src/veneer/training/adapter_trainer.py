"""Trainer of attached methods, shared by personalization, control and classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from veneer.injection import Attachment

from . import param_groups
from .loop.config import TrainConfig
from .loop.optimizer_step import LossStep
from .loop.optimizers import ParameterGroup
from .loop.trainer import Trainer
from .report.progress import Progress

if TYPE_CHECKING:
    from .loop.sharded_base import ShardedBase


def adapter_trainer(
    attached: Sequence[Attachment],
    loss: LossStep,
    config: TrainConfig,
    groups: Sequence[ParameterGroup],
    folder: Path | None,
    *,
    identity: Mapping[str, Any],
    accelerator: Accelerator,
    on_preview: Callable[[int], object],
    on_step: Callable[[Progress], None] | None,
    named: Mapping[str, Tensor] | None = None,
    base: ShardedBase | None = None,
    different: int | None = None,
) -> Trainer:
    """A `Trainer` of the parameters of attachments, with the selections, penalties and `after_step` callbacks of their methods.

    Args:
        attached: trained attachments.
        loss: loss without the penalties of the methods.
        config, groups, folder, identity, accelerator, base, on_step, on_preview: see `Trainer`.
        named: tensors in checkpoints (default: `param_groups.named_state(attached)`).
        different: number of different samples; None if every sample of the run has other noise.
    """
    checked = param_groups.check_first_gradients(param_groups.add_penalties(loss, attached), attached)
    return Trainer(
        config,
        groups,
        param_groups.select_entries(checked, loss, attached, config, accelerator, different),
        param_groups.named_state(attached) if named is None else named,
        folder,
        identity=identity,
        accelerator=accelerator,
        base=base,
        after_step=param_groups.after_step(attached),
        on_step=on_step,
        on_preview=on_preview,
    )
