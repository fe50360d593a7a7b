"""The epoch that is kept, what is kept of it, and what a resumed run forgets."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tests.raising import warns
from veneer.classification.train import epoch_selection as module
from veneer.classification.train.epoch_selection import Epoch, Selection
from veneer.training.loop.checkpoints import CheckpointWarning


def epoch(number: int, accuracy: float, loss: float = 1.0) -> Epoch:
    return Epoch(number, 10 * number, 0.5, loss, accuracy)


def test_the_best_accuracy_is_kept_then_the_lower_loss_then_the_earlier(tmp_path: Path) -> None:
    weight = torch.zeros(2)
    selection = Selection({"w": weight}, tmp_path)
    for number, (accuracy, loss) in enumerate([(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.1)], 1):
        weight.fill_(number)
        selection.add(epoch(number, accuracy, loss))
    assert selection.best.epoch == 3
    selection.restore()
    assert weight.tolist() == [3, 3]


def test_patience_counts_from_the_best(tmp_path: Path) -> None:
    selection = Selection({"w": torch.zeros(1)}, tmp_path, patience=2)
    told = []
    for number, accuracy in enumerate([0.5, 0.6, 0.6, 0.4], 1):
        selection.add(epoch(number, accuracy))
        told.append(selection.exhausted)
    assert told == [False, False, False, True]
    assert not Selection({"w": torch.zeros(1)}, tmp_path).exhausted


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    first = Selection({"w": weight}, tmp_path)
    for number, accuracy in enumerate([0.5, 0.4, 0.9], 1):
        weight.fill_(number)
        first.add(epoch(number, accuracy))
    again = Selection({"w": weight}, tmp_path)
    again.resume(step=20)
    assert [e.epoch for e in again.epochs] == [1, 2]
    weight.fill_(3)
    again.add(epoch(3, 0.9))
    assert again.epochs == first.epochs
    again.restore()
    assert weight.item() == 3


def test_a_full_disk_costs_nobody_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    weight = torch.zeros(1)
    selection = Selection({"w": weight}, tmp_path)
    selection.add(epoch(1, 0.5))
    monkeypatch.setattr(module, "write_atomically", full)
    for number, accuracy in ((2, 0.9), (3, 0.6)):
        weight.fill_(number)
        with warns(CheckpointWarning, given=errno.ENOSPC):
            selection.add(epoch(number, accuracy))
    selection.restore()
    assert weight.item() == 2


def test_a_curve_without_its_weights_is_begun_anew(tmp_path: Path) -> None:
    first = Selection({"w": torch.zeros(1)}, tmp_path)
    first.add(epoch(1, 0.5))
    (tmp_path / "best.safetensors").unlink()
    again = Selection({"w": torch.zeros(1)}, tmp_path)
    again.resume(step=10)
    assert again.epochs == []
