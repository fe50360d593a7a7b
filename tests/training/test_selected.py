"""Methods that select entries: the selection precedes the first step and is not repeated; exact resume after a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.resume_worker import CONFIG, Job
from tests.training.selected import selected_trainer
from tests.training.test_resume import Worker, final
from veneer.training.loop.trainer import TrainConfig

STEPS = 8
SETTINGS: dict[str, Any] = {"steps": STEPS, "checkpoint_every": 3}
SCORED = 6 + 4 + 3
"""Losses of single samples before the first step, of all selections."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks its processes, which this system cannot")
def test_a_kill_changes_nothing_and_two_processes_select_the_same(worker: Worker, tmp_path: Path) -> None:
    """Killed after the first checkpoint; `final` compares bitwise."""
    for processes in (1, 2):
        whole, killed = tmp_path / f"whole-{processes}", tmp_path / f"killed-{processes}"
        job = {"processes": processes, "config": SETTINGS, "model": "selected", "dropout": 0.0}
        assert worker.run(Job(str(whole), **job)) == [0] * processes
        losses = SCORED + 4 * (2 if processes == 1 else 1)
        assert -worker.run(Job(str(killed), after=losses + 12, **job))[0] == signal.SIGKILL
        assert [p.name for p in killed.glob("checkpoint-*")] == ["checkpoint-000003"]
        assert worker.run(Job(str(killed), **job)) == [0] * processes
        assert final(killed, STEPS) == final(whole, STEPS)


def test_a_resumed_run_does_not_select_again(tmp_path: Path) -> None:
    config = TrainConfig(**{**CONFIG, **SETTINGS, "checkpoint_every": 0})
    of_whole, of_first, of_second = [], [], []
    whole = selected_trainer(None, config, seen=of_whole)
    assert not any(bool(t) for key, t in whole.named.items() if key.endswith("selected"))
    whole.fit()
    per_step = config.samples
    expected = [divmod(n, per_step) for n in (*range(6), *range(4), *range(3))]
    assert of_whole[:SCORED] == [(step, [row]) for step, row in expected]
    assert all(len(rows) == config.batch for _, rows in of_whole[SCORED:])
    first = selected_trainer(tmp_path, config, seen=of_first)
    first.on_step = lambda progress: first.stop() if progress.step == 3 else None
    assert first.fit().stopped
    second = selected_trainer(tmp_path, config, seen=of_second)
    resumed = second.fit(resume=True).resumed_from
    assert of_second[0] == (resumed, [0, 1])
    assert all(step >= resumed for step, _ in of_second)
    assert second.losses == whole.losses
    assert [name for name, tensor in whole.named.items() if not torch.equal(second.named[name], tensor)] == []
    chosen = [t for key, t in second.named.items() if key.endswith("selected")]
    assert len(chosen) == 2
    assert all(chosen)
    assert all(bool(t.any()) for key, t in second.named.items() if key.startswith("eva/") and key.endswith(":down"))
