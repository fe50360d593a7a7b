"""Trainer of attached methods, shared by the personalization and control pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from veneer.injection import Attachment

from . import param_groups
from .loop.config import TrainConfig
from .loop.optimizer_step import LossStep
from .loop.optimizers import ParameterGroup
from .loop.trainer import Trainer
from .report.progress import ProgressLine


def adapter_trainer(
    attached: Sequence[Attachment],
    loss: LossStep,
    config: TrainConfig,
    groups: Sequence[ParameterGroup],
    folder: Path,
    *,
    identity: Mapping[str, Any],
    accelerator: Accelerator,
    on_preview: Callable[[int], None],
) -> Trainer:
    """A `Trainer` of the parameters of attachments, with the penalties and `after_step` callbacks of their methods.

    Args:
        attached: trained attachments; checkpoints contain their `named_state`.
        loss: loss without the penalties of the methods.
        config, groups, folder, identity, accelerator, on_preview: see `Trainer`.
    """
    return Trainer(
        config,
        groups,
        param_groups.add_penalties(loss, attached),
        param_groups.named_state(attached),
        folder,
        identity=identity,
        accelerator=accelerator,
        after_step=param_groups.after_step(attached),
        on_step=ProgressLine(),
        on_preview=on_preview,
    )
