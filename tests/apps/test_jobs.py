"""Training jobs as processes of their own: one at a time, stopped, killed and resumed, whatever becomes of the server."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer.apps import jobs, worker
from veneer.apps.job_queue import JobQueue
from veneer.apps.jobs import MAX_ATTEMPTS, Job

import veneer
from tests.methods.controls import picture
from veneer.testing.pipelines import tiny_pipeline

PATIENCE = 300
"""Timeout of a process in seconds."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command of a job on a tiny base model, without its steps."""
    folder = tmp_path_factory.mktemp("given")
    tiny_pipeline("sd").save_pretrained(folder / "base")
    (folder / "photos").mkdir()
    for seed in range(2):
        picture(seed).save(folder / "photos" / f"{seed}.png")
    given = ["personalize", str(folder / "photos"), "--base", str(folder / "base"), "--concept", "<toy>", "--method", "lora"]
    return [*given, "--eval-seeds", "0", "--tracker", "none", "--checkpoint-every", "5", "--steps"]


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_jobs_run_one_at_a_time(tmp_path: Path, words: list[str]) -> None:
    folder = tmp_path / "local" / "jobs"
    first = jobs.create_job(folder, "train", "a toy", [*words, "2"])
    wrong = jobs.create_job(tmp_path / "another" / "jobs", "train", "no such flag", ["personalize", "--sepia"])
    queue = JobQueue(tmp_path)
    assert [job.state for job in (first, wrong)] == ["waiting", "waiting"]
    assert (queue.position(first), queue.position(wrong)) == (0, 1)
    until(lambda: queue.start_next() == first, "no other process is on its way")
    assert queue.start_next() is None, "one runs"
    until(lambda: first.state == "running", first.log())
    assert JobQueue(tmp_path).start_next() is None, "for another server too"
    until(lambda: first.state == "done", first.log())
    assert first.progress()[-1].step == 2
    assert (first.run / "adapter.safetensors").exists()
    until(lambda: queue.start_next() == wrong, "the next one begins")
    until(lambda: wrong.state == "failed", wrong.log())
    assert "unrecognized arguments: --sepia" in wrong.failure()
    assert queue.start_next() is None, "what failed is not tried again"
    assert [job.name for job in jobs.find_jobs(folder)] == [first.name]


def test_stop_kill_and_resume(tmp_path: Path, words: list[str]) -> None:
    job = jobs.create_job(tmp_path / "local" / "jobs", "train", "a toy", [*words, "100000"])
    queue = JobQueue(tmp_path)
    until(lambda: queue.start_next() == job, "no other process is on its way")
    until(lambda: job.progress(), job.log())
    job.stop()
    until(lambda: job.state == "stopped", job.log())
    kept = job.run / "adapter.safetensors"
    assert veneer.formats.read(kept).shapes, "what was learnt so far"
    assert queue.start_next() is None, "what was stopped does not begin by itself"
    reached = job.progress()[-1].step

    job.resume()
    until(lambda: queue.start_next() == job, "it waits again")
    until(lambda: job.progress()[-1].step > reached + 5, job.log())
    os.kill(json.loads((job.folder / "process.json").read_text())["pid"], signal.SIGKILL)
    until(lambda: job.state == "waiting", "its lock is let go")
    assert job.was_started
    killed = job.progress()[-1].step
    until(lambda: JobQueue(tmp_path).start_next() == job, "a server that is started anew resumes it")
    until(lambda: job.progress()[-1].step > killed, job.log())
    job.stop()
    until(lambda: job.state == "stopped", job.log())
    assert "resum" in job.log() or job.progress()[0].step == 1


def test_job_that_dies_repeatedly_fails(tmp_path: Path) -> None:
    """Its process is killed before a step, as when out of memory."""
    job = jobs.create_job(tmp_path / "local" / "jobs", "train", "too large", ["personalize"])
    for _ in range(MAX_ATTEMPTS):
        assert job.start()
        process = jobs._processes[-1]
        process.kill()
        process.wait()
        assert job.state == "waiting"
    assert not job.start()
    assert job.state == "failed"
    assert job.failure().startswith(f"It died {MAX_ATTEMPTS} times at step 0: the machine may be out of memory")
    job.resume()
    assert job.state == "waiting", "somebody asked for another try"


def test_a_job_that_was_deleted_before_its_process_began_stays_deleted(tmp_path: Path) -> None:
    assert worker.work(tmp_path / "deleted") == 0
    assert not (tmp_path / "deleted").exists()


def test_corrupt_job_files_are_tolerated(tmp_path: Path) -> None:
    job = Job(tmp_path / "x")
    job.folder.mkdir()
    (job.folder / "job.json").write_text("{")
    assert (job.metadata, job.state, job.progress(), job.log(), job.failure()) == ({}, "waiting", [], "", "")
    assert jobs.find_jobs(tmp_path) == [job]
