"""A method's own look at the training data, before it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .attachment import Attachment


def prepare(attachment: Attachment, batches: Iterable[tuple[Tensor, Tensor]], run: nn.Module | None) -> None:
    """`Method.prepare` on the model in evaluation mode, without a graph. `run`: what is called in the model's place."""
    (tower,) = attachment.towers.values()
    modes = {m: m.training for m in tower.modules()}
    tower.eval()
    try:
        with torch.no_grad():
            attachment.method.prepare(list(attachment.parts.values()), run or tower, batches)
    finally:
        for module, mode in modes.items():
            module.training = mode
