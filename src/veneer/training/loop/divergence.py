"""What happens when a loss or gradient is no longer finite: the last good weights are kept, and the error says where."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from veneer.injection.errors import VeneerError

from .checkpoints import to_bytes, write_atomically


class LastGood:
    """A copy of some tensors as they were when they last gave a finite loss and gradient."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._copies: list[Tensor] = []
        self._step = 0

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Remember the tensors as they are after `step` updates."""
        self._step = step
        if self._copies:
            torch._foreach_copy_(self._copies, self._tensors)
        else:
            self._copies = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self, step: int) -> int:
        """Put the copies back; gives how many updates they have had: `step` if nothing was taken, so nothing changed."""
        if not self._copies:
            return step
        torch._foreach_copy_(self._tensors, self._copies)
        return self._step


class Diverged(VeneerError):
    """Training left the finite numbers and stopped.

    Attributes:
        step: the step (0-based) whose loss or gradient was not finite. where: "loss" or "gradient". given: its value.
        learning_rate: the rate of that step.
        kept: updates that the weights now in the model have had: the last with a finite loss.
        file: path of these weights as a file, or None if there is no folder or it could not be written.
        checkpoint: the newest checkpoint, from before, or None.
    """

    def __init__(
        self,
        step: int,
        where: str,
        given: float,
        learning_rate: float,
        kept: int,
        file: Path | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.step, self.learning_rate, self.kept, self.checkpoint = step, learning_rate, kept, checkpoint
        places = "in the model" + (f" and in {file}" if file else "")
        earlier = f" The newest checkpoint is {checkpoint}." if checkpoint else ""
        super().__init__(
            f"training diverged in step {step}: the {where} is {given}, with learning rate {learning_rate:.3g}. "
            f"The weights after {kept} updates, the last with a finite loss, are kept {places}.{earlier} "
            f"Try a learning rate of {learning_rate / 10:.1g}, a longer warmup, max_grad_norm=1.0, and "
            "mixed_precision=bf16 instead of fp16.",
            where=where,
            given=given,
            file=file,
        )
        self.file: Path | None = file


def write_last_good(folder: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """Write `last_good.safetensors` into a folder; None if the disk refuses."""
    path = folder / "last_good.safetensors"
    with contextlib.suppress(OSError):
        write_atomically(path, to_bytes(tensors))
        return path
    return None
