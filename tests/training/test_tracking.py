"""Records in TensorBoard's files, and trackers that are unknown or missing."""

import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.raising import raises
from tests.training.resume_worker import trainer_of
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.errors import TrainError
from veneer.training.report import tracking as module
from veneer.training.report.tracking import select_trackers, tracking


def scalars(folder, tag):
    events = EventAccumulator(str(folder / "logs" / "veneer"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_by_default(tmp_path):
    result = trainer_of(tmp_path, TrainConfig(steps=4, log_every=2), 0.0).fit()
    losses = scalars(tmp_path, "loss")
    assert losses == {2: pytest.approx(result.losses[1]), 4: pytest.approx(result.losses[3])}
    assert scalars(tmp_path, "learning_rate") == {2: pytest.approx(1e-4), 4: pytest.approx(1e-4)}
    assert set(scalars(tmp_path, "gradient_norm")) == {2, 4}


def test_resumed_records_replace_those_after_the_checkpoint(tmp_path):
    with tracking("tensorboard", tmp_path, {}) as record:
        for step in (1, 2, 3, 4):
            record({"loss": 10.0 + step}, step)
    with tracking("tensorboard", tmp_path, {}, step=2) as record:
        record({"loss": 23.0}, 3)
    assert scalars(tmp_path, "loss") == {1: 11.0, 2: 12.0, 3: 23.0}


def test_none_writes_nothing(tmp_path):
    with tracking("none", tmp_path, {}) as record:
        record({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_unknown_tracker_lists_the_known(tmp_path):
    with raises(TrainError, where="tracker", given="tensorbord") as caught:
        select_trackers("tensorbord")
    assert "tensorboard" in caught.value.expected


def test_a_missing_package_warns_and_training_continues(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(module, "get_available_trackers", lambda: [])
    with caplog.at_level(logging.WARNING), tracking("tensorboard", tmp_path, {}) as record:
        record({"loss": 1.0}, 1)
    assert "tracker tensorboard is disabled: its package is not installed" in caplog.text
