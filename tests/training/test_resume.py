"""N steps equal k steps, kill -9 and N - k more: bitwise in weights, optimizer, EMA weights, data and noise."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.training.kill_points import CONFIG as PIPELINE
from tests.training.kill_points import traced
from tests.training.resume_worker import CONFIG, Job

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks its processes, which this system cannot")
pytestmark = FORKS

STEPS = CONFIG["steps"]
LAST = f"checkpoint-{STEPS:06d}"


class Worker:
    """The process that runs jobs."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.resume_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def run(self, job: Job) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([port, asdict(job)]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._log.close()


@pytest.fixture(scope="module")
def uninterrupted(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"whole-{processes}")
        assert worker.run(Job(str(folders[processes]), processes)) == [0] * processes
    return folders


def final(folder: Path, steps: int = STEPS) -> dict[str, object]:
    """Content of the last checkpoint without the time."""
    last = folder / f"checkpoint-{steps:06d}"
    state = json.loads((last / "state.json").read_text())
    del state["values"]["seconds"]
    return {"state": state, **{path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}}


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_change_nothing(processes: int, worker: Worker, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    """Runs that are killed again and again, at seeded moments of which about half lie within the saving."""
    draw = random.Random(processes)
    kills, chain = 0, 0
    while kills < 5:
        folder = tmp_path / f"chain-{chain}"
        for _ in range(7):
            job = Job(str(folder), processes, rank=draw.randrange(processes), after=draw.randrange(1, 45))
            if worker.run(job) == [0] * processes:
                break
            kills += 1
        assert worker.run(Job(str(folder), processes)) == [0] * processes
        assert final(folder) == final(uninterrupted[processes])
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        chain += 1


@pytest.mark.parametrize("after", range(11, 27))
def test_kill_at_every_moment_of_a_save(after: int, worker: Worker, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    """Two saves and the deletion of the oldest checkpoint, one event after the other; then a second kill while saving."""
    assert worker.run(Job(str(tmp_path), after=after + 14)) == [-signal.SIGKILL]
    assert worker.run(Job(str(tmp_path), after=after)) == [-signal.SIGKILL]
    assert worker.run(Job(str(tmp_path))) == [0]
    assert final(tmp_path) == final(uninterrupted[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_from_outside(processes: int, worker: Worker, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    draw = random.Random(7)
    for _ in range(2):
        worker.run(Job(str(tmp_path), processes, seconds=draw.uniform(0.05, 0.5)))
    assert worker.run(Job(str(tmp_path), processes)) == [0] * processes
    assert final(tmp_path) == final(uninterrupted[processes])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_saves_and_resumes(
    processes: int, number: signal.Signals, worker: Worker, uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    """One process gets the signal; all finish the step and exit normally, with a checkpoint between the intervals."""
    job = Job(str(tmp_path), processes, rank=processes - 1, after=3, signal=number, config={"checkpoint_every": 0})
    assert worker.run(job) == [0] * processes
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    assert worker.run(Job(str(tmp_path), processes)) == [0] * processes
    assert final(tmp_path) == final(uninterrupted[processes])


def test_two_processes_equal_one(worker: Worker, tmp_path: Path) -> None:
    """Without dropout; in a step of 5 samples the shares of two processes are 2 and 3."""
    weights = {}
    for processes in (1, 2):
        job = Job(str(tmp_path / str(processes)), processes, config={"batch": 5, "gradient_accumulation_steps": 1}, dropout=0.0)
        assert worker.run(job) == [0] * processes
        weights[processes] = safetensors.torch.load_file(tmp_path / str(processes) / LAST / "weights.safetensors")
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantized_pipeline_with_lora(worker: Worker, tmp_path: Path) -> None:
    """Killed at three moments, one of them while saving."""
    config = {**PIPELINE, "steps": 5, "checkpoint_every": 2}
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert worker.run(Job(str(whole), model="quantized", config=config)) == [0]
    for after in (2, 4, 6):
        assert worker.run(Job(str(part), after=after, model="quantized", config=config)) == [-signal.SIGKILL]
    assert worker.run(Job(str(part), model="quantized", config=config)) == [0]
    assert final(part, 5) == final(whole, 5)
    assert traced(part) == traced(whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pipeline_with_lora(processes: int, worker: Worker, tmp_path: Path) -> None:
    """Real data and noise: the same images, captions and random states too. `kill_points` has many more moments."""
    config = {**PIPELINE, "steps": 5, "checkpoint_every": 2}
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert worker.run(Job(str(whole), processes, model="pipeline", config=config)) == [0] * processes
    codes = worker.run(Job(str(part), processes, rank=processes - 1, after=4, model="pipeline", config=config))
    assert -signal.SIGKILL in codes
    assert worker.run(Job(str(part), processes, model="pipeline", config=config)) == [0] * processes
    assert final(part, 5) == final(whole, 5)
    assert traced(part) == traced(whole)
    assert len(traced(whole)) == 5 * processes
