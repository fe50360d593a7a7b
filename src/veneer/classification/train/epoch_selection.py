"""Selection of the epoch: best validation accuracy, or last. The test split is not used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from veneer.atomic_files import write_atomically
from veneer.training.loop.checkpoints import CheckpointWarning


@dataclass(frozen=True)
class Epoch:
    """Metrics after an epoch.

    Args:
        epoch: counted from 1. `step`: optimizer steps so far.
        train_loss: mean over the epoch's steps. `val_loss`: on the validation split.
        val_accuracy: `Metrics.score` of the validation split: the accuracy, or the mean average precision of several labels.
    """

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    val_accuracy: float


def read_epochs(folder: Path) -> list[Epoch]:
    """Epochs of a running or finished run, from its result files; empty before the first epoch."""
    for name in ("result.json", "curve.json"):
        try:
            record = json.loads((folder / name).read_text(encoding="utf-8"))
            return [Epoch(**row) for row in (record["epochs"] if name == "result.json" else record)]
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return []


class EpochSelection:
    """Records the metrics of every epoch and the tensors of the best: highest accuracy, then lowest loss, then earliest.

    Both are written after every epoch, so that an interrupted run loses neither. If the disk is full, the best tensors stay in
    memory and a warning is issued. A resumed run drops the epochs after its checkpoint and repeats them bit for bit.

    Args:
        named: every tensor that training changes, by name.
        folder: of `curve.json` and `best.safetensors`.
        patience: epochs without improvement until `exhausted`; 0 disables early stopping.
        last: select the last epoch instead of the best.
        first: step from which an epoch may be the best, if there is one; `patience` counts the epochs from there.
    """

    def __init__(
        self, named: Mapping[str, Tensor], folder: Path, patience: int = 0, *, last: bool = False, first: int = 0
    ) -> None:
        self.named, self.folder, self.patience, self.last, self.first = dict(named), folder, patience, last, first
        self.epochs: list[Epoch] = []
        self._best_tensors: dict[str, Tensor] | None = None

    def resume(self, step: int) -> None:
        """Restores the epochs of a run that is resumed at `step`."""
        file = self.folder / "curve.json"
        if file.is_file() and (self.folder / "best.safetensors").is_file():
            read = [Epoch(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
            self.epochs = [epoch for epoch in read if epoch.step <= step]

    def add(self, epoch: Epoch) -> None:
        """Records an epoch, and its tensors if it is the best."""
        self.epochs = [known for known in self.epochs if known.step < epoch.step] + [epoch]
        if self.best is epoch:
            self._best_tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.named.items()}
            self._write("best.safetensors", save(self._best_tensors))
        self._write("curve.json", json.dumps([asdict(e) for e in self.epochs], indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.folder / name, data)
        except OSError as error:
            message = f"{name} could not be written ({error.strerror}). The run continues with it in memory; free disk space."
            warnings.warn(CheckpointWarning(message, where=name, given=error.errno, file=self.folder / name), stacklevel=3)

    @property
    def best(self) -> Epoch:
        """The selected epoch: the most accurate, or the last."""
        return self.epochs[-1] if self.last else self._most_accurate

    @property
    def _most_accurate(self) -> Epoch:
        candidates = [epoch for epoch in self.epochs if epoch.step >= self.first] or self.epochs
        return min(candidates, key=lambda e: (-e.val_accuracy, e.val_loss, e.step))

    @property
    def exhausted(self) -> bool:
        """True if there was no improvement for `patience` epochs."""
        if not self.patience or not self.epochs or self.epochs[-1].step < self.first:
            return False
        return len(self.epochs) - 1 - self.epochs.index(self._most_accurate) >= self.patience

    def restore(self) -> None:
        """Copies the best epoch's tensors into the model."""
        best = self._best_tensors or load_file(self.folder / "best.safetensors")
        with torch.no_grad():
            for name, tensor in self.named.items():
                tensor.copy_(best[name])
