"""Divergence: the weights of the last finite loss are restored, and the error has the step and learning rate."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from veneer.atomic_files import write_atomically
from veneer.injection.errors import VeneerError

from .checkpoints import to_bytes


class LastGood:
    """A copy of tensors from the last step with a finite loss and gradient."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._copies: list[Tensor] = []
        self._step = 0

    @torch.no_grad()
    def save(self, step: int) -> None:
        """Copies the tensors after `step` updates."""
        self._step = step
        if self._copies:
            torch._foreach_copy_(self._copies, self._tensors)
        else:
            self._copies = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self, step: int) -> int:
        """Restores the copies; returns their number of updates, or `step` without copies."""
        if not self._copies:
            return step
        torch._foreach_copy_(self._tensors, self._copies)
        return self._step


class Diverged(VeneerError):
    """The loss or gradient is no longer finite.

    Attributes:
        step: the step (0-based) whose loss or gradient was not finite. where: "loss" or "gradient". given: its value.
        learning_rate: learning rate of that step.
        restored_step: number of updates of the restored weights, the last with a finite loss.
        file: path of these weights, or None without a folder or if it could not be written.
        checkpoint: the newest checkpoint, or None.
    """

    def __init__(
        self,
        step: int,
        where: str,
        given: float,
        learning_rate: float,
        restored_step: int,
        file: Path | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.step, self.learning_rate, self.restored_step, self.checkpoint = step, learning_rate, restored_step, checkpoint
        places = "in the model" + (f" and in {file}" if file else "")
        earlier = f" The newest checkpoint is {checkpoint}." if checkpoint else ""
        super().__init__(
            f"training diverged in step {step}: the {where} is {given}, with learning rate {learning_rate:.3g}. "
            f"The weights after {restored_step} updates, the last with a finite loss, are kept {places}.{earlier} "
            f"Try a learning rate of {learning_rate / 10:.1g}, a longer warmup, max_grad_norm=1.0, and "
            "mixed_precision=bf16 instead of fp16.",
            where=where,
            given=given,
            file=file,
        )
        self.file: Path | None = file


def write_last_good(folder: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """Writes `last_good.safetensors` to a folder; None if that fails."""
    path = folder / "last_good.safetensors"
    with contextlib.suppress(OSError):
        write_atomically(path, to_bytes(tensors))
        return path
    return None
