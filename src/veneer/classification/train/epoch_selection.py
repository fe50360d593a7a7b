"""Which epoch is kept: the one with the best validation accuracy. The test pictures have no part in it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from veneer.training.loop.checkpoints import CheckpointWarning, write_atomically


@dataclass(frozen=True)
class Epoch:
    """The figures after an epoch.

    Args:
        epoch: counted from 1. `step`: steps done.
        train_loss: mean over its steps. `val_loss`, `val_accuracy`: of the validation pictures.
    """

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    val_accuracy: float


def read_epochs(folder: Path) -> list[Epoch]:
    """The epochs of a run so far, while it runs and when it has ended; none where nothing can be read."""
    for name in ("result.json", "curve.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return [Epoch(**row) for row in (found["epochs"] if name == "result.json" else found)]
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return []


class Selection:
    """Keeps the figures of every epoch and the tensors of the best: the highest accuracy, then the lower loss, then the earlier.

    Both are written at once, so that a stopped run loses neither; where the disk has no room, the best is kept in memory, with a
    warning. A resumed run forgets what came after its checkpoint; it will come again, the same to the bit.

    Args:
        named: every tensor that training changes, by name.
        folder: where `curve.json` and `best.safetensors` are kept.
        patience: epochs without a better one before `exhausted`; 0 for never.
    """

    def __init__(self, named: Mapping[str, Tensor], folder: Path, patience: int = 0) -> None:
        self.named, self.folder, self.patience = dict(named), folder, patience
        self.epochs: list[Epoch] = []
        self._kept: dict[str, Tensor] | None = None

    def resume(self, step: int) -> None:
        """Read what a run of `step` steps has left."""
        file = self.folder / "curve.json"
        if file.is_file() and (self.folder / "best.safetensors").is_file():
            read = [Epoch(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
            self.epochs = [epoch for epoch in read if epoch.step <= step]

    def add(self, epoch: Epoch) -> None:
        """Note an epoch, and its tensors if it is the best."""
        self.epochs = [known for known in self.epochs if known.step < epoch.step] + [epoch]
        if self.best is epoch:
            self._kept = {name: t.detach().cpu().contiguous().clone() for name, t in self.named.items()}
            self._write("best.safetensors", save(self._kept))
        self._write("curve.json", json.dumps([asdict(e) for e in self.epochs], indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.folder / name, data)
        except OSError as error:
            message = f"{name} could not be written ({error.strerror}). The run goes on with it in memory; make room."
            warnings.warn(CheckpointWarning(message, where=name, given=error.errno, file=self.folder / name), stacklevel=3)

    @property
    def best(self) -> Epoch:
        """The epoch to keep."""
        return min(self.epochs, key=lambda e: (-e.val_accuracy, e.val_loss, e.step))

    @property
    def exhausted(self) -> bool:
        """True if `patience` epochs have passed since the best."""
        if not self.patience or not self.epochs:
            return False
        return len(self.epochs) - 1 - self.epochs.index(self.best) >= self.patience

    def restore(self) -> None:
        """Put the best epoch's tensors in place."""
        kept = self._kept or load_file(self.folder / "best.safetensors")
        with torch.no_grad():
            for name, tensor in self.named.items():
                tensor.copy_(kept[name])
