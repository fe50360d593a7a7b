"""Epoch selection: the best epoch, its weights, early stopping and resuming."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tests.raising import warns
from veneer.classification.train import epoch_selection as module
from veneer.classification.train.epoch_selection import Epoch, EpochSelection
from veneer.training.loop.checkpoints import CheckpointWarning


def epoch(number: int, accuracy: float, loss: float = 1.0) -> Epoch:
    return Epoch(number, 10 * number, 0.5, loss, accuracy)


def test_best_epoch_by_accuracy_then_loss_then_order(tmp_path: Path) -> None:
    weight = torch.zeros(2)
    selection = EpochSelection({"w": weight}, tmp_path)
    for number, (accuracy, loss) in enumerate([(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.1)], 1):
        weight.fill_(number)
        selection.add(epoch(number, accuracy, loss))
    assert selection.best.epoch == 3
    selection.restore()
    assert weight.tolist() == [3, 3]


def test_last_epoch(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    selection = EpochSelection({"w": weight}, tmp_path, last=True)
    for number, accuracy in enumerate([0.5, 0.7, 0.6], 1):
        weight.fill_(number)
        selection.add(epoch(number, accuracy))
        weight.fill_(0)
    assert selection.best.epoch == 3
    selection.restore()
    assert weight.item() == 3


@pytest.mark.parametrize("last", [False, True])
def test_patience_counts_from_the_best_epoch(tmp_path: Path, last: bool) -> None:
    selection = EpochSelection({"w": torch.zeros(1)}, tmp_path, patience=2, last=last)
    exhausted = []
    for number, accuracy in enumerate([0.5, 0.6, 0.6, 0.4], 1):
        selection.add(epoch(number, accuracy))
        exhausted.append(selection.exhausted)
    assert exhausted == [False, False, False, True]
    assert not EpochSelection({"w": torch.zeros(1)}, tmp_path).exhausted


def test_the_best_epoch_is_one_after_the_schedule_of_the_method(tmp_path: Path) -> None:
    """Before step 30 heads are pruned: the most accurate model has too many of them."""
    weight = torch.zeros(1)
    selection = EpochSelection({"w": weight}, tmp_path, patience=1, first=30)
    chosen, exhausted = [], []
    for number, accuracy in enumerate([0.9, 0.8, 0.5, 0.6, 0.6], 1):
        weight.fill_(number)
        selection.add(epoch(number, accuracy))
        chosen.append(selection.best.epoch)
        exhausted.append(selection.exhausted)
    assert chosen == [1, 1, 3, 4, 4]
    assert exhausted == [False, False, False, False, True]
    selection.restore()
    assert weight.item() == 4


def test_resume_drops_epochs_after_the_checkpoint(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    first = EpochSelection({"w": weight}, tmp_path)
    for number, accuracy in enumerate([0.5, 0.4, 0.9], 1):
        weight.fill_(number)
        first.add(epoch(number, accuracy))
    again = EpochSelection({"w": weight}, tmp_path)
    again.resume(step=20)
    assert [e.epoch for e in again.epochs] == [1, 2]
    weight.fill_(3)
    again.add(epoch(3, 0.9))
    assert again.epochs == first.epochs
    again.restore()
    assert weight.item() == 3


def test_full_disk_keeps_the_best_epoch_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    weight = torch.zeros(1)
    selection = EpochSelection({"w": weight}, tmp_path)
    selection.add(epoch(1, 0.5))
    monkeypatch.setattr(module, "write_atomically", full)
    for number, accuracy in ((2, 0.9), (3, 0.6)):
        weight.fill_(number)
        with warns(CheckpointWarning, given=errno.ENOSPC):
            selection.add(epoch(number, accuracy))
    selection.restore()
    assert weight.item() == 2


def test_curve_without_weights_is_discarded(tmp_path: Path) -> None:
    first = EpochSelection({"w": torch.zeros(1)}, tmp_path)
    first.add(epoch(1, 0.5))
    (tmp_path / "best.safetensors").unlink()
    again = EpochSelection({"w": torch.zeros(1)}, tmp_path)
    again.resume(step=10)
    assert again.epochs == []
