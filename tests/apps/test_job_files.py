"""Job files: queue order, stop, and output of the worker; no model is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from veneer.apps import jobs, worker
from veneer.apps.job_queue import JobQueue
from veneer.apps.jobs import LOG_LIMIT, MAX_ATTEMPTS, Job
from veneer.apps.worker import work

from veneer import allocator
from veneer.training.report.progress import Progress, ProgressFile

WRONG = ["personalize", "--sepia"]
"""Command that fails at once."""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return jobs.create_job(tmp_path / "local" / "jobs", "train", "a toy", WRONG)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of started jobs, recorded instead of starting processes."""
    found: list[str] = []

    class Process:
        def __init__(self, command: list[str], **options: Any) -> None:
            found.append(command[-1])

        def poll(self) -> int:
            return 0

        wait = poll

    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    monkeypatch.setattr(jobs, "_processes", [])
    return found


def test_oldest_job_of_all_users_is_next(tmp_path: Path, begun: list[str]) -> None:
    made = {user: jobs.create_job(tmp_path / user / "jobs", "train", user, WRONG) for user in ("b", "d", "a", "c")}
    for number, job in enumerate(made.values()):
        jobs.write_json(job.folder / "job.json", {**job.metadata, "made": 1000.0 + number})
    queue = JobQueue(tmp_path)
    assert [queue.position(job) for job in made.values()] == [0, 1, 2, 3]
    for job in made.values():
        assert queue.start_next() == job
        (job.folder / "end.json").write_text('{"status": 1}')
    assert queue.start_next() is None
    assert begun == [str(job.folder) for job in made.values()]


def test_no_job_starts_while_another_server_runs_one(tmp_path: Path, begun: list[str]) -> None:
    runs, waits = (jobs.create_job(tmp_path / user / "jobs", "train", "a toy", WRONG) for user in ("a", "b"))
    queue = JobQueue(tmp_path)
    with FileLock(runs.folder / "lock"):
        assert queue.start_next() is None
    runs.stop()
    assert queue.start_next() == waits


def test_stop_file_exists_before_the_signal(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number, (job.folder / "stop").exists())))
    (job.folder / "process.json").write_text('{"pid": 1234567}')
    with FileLock(job.folder / "lock"):
        job.stop()
    assert told == [(1234567, signal.SIGTERM, True)]


def test_stop_does_not_signal_an_unrelated_process(job: Job, begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ID may belong to another process by now."""
    told: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append(pid))
    (job.folder / "process.json").write_text('{"pid": 1234567}')
    job.stop()
    assert told == [], "nobody holds its lock"
    job.resume()
    assert job.start()
    with FileLock(job.folder / "lock"):  # the next process, which has not said yet who it is
        job.stop()
    assert told == []


def test_stop_of_an_ending_process_is_no_error(job: Job) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (job.folder / "process.json").write_text(json.dumps({"pid": ended.pid}))
    with FileLock(job.folder / "lock"):
        job.stop()
    assert job.state == "stopped"


def test_attempts_are_counted_per_step_and_reset_on_resume(job: Job, begun: list[str]) -> None:
    assert all(job.start() for _ in range(MAX_ATTEMPTS - 1)), "it dies before its first step"
    ProgressFile(job.run / "progress.jsonl", seconds=0)(Progress(5, 40, 1.0, 1.0, 1e-3, 1.0, 1.0, None, 0))
    assert all(job.start() for _ in range(MAX_ATTEMPTS)), "it has come further since"
    assert not job.start()
    assert job.failure().startswith(f"It died {MAX_ATTEMPTS} times at step 5")
    job.resume()
    assert all(job.start() for _ in range(MAX_ATTEMPTS))
    assert not job.start()
    assert len(begun) == 3 * MAX_ATTEMPTS - 1


def test_failure_is_read_from_the_end_of_the_log(job: Job) -> None:
    lines = ["veneer: the first trouble", "x" * LOG_LIMIT, "veneer: the second trouble", "veneer: the last trouble", "bye"]
    (job.folder / "log.txt").write_text("\n".join(lines))
    (job.folder / "end.json").write_text('{"status": 1}')
    assert len(job.log()) == LOG_LIMIT
    assert job.log().endswith("bye")
    assert job.failure() == "the last trouble"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the worker from changing the allocator of the test process."""
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: True)


@pytest.mark.usefixtures("here")
def test_worker_records_its_status_and_appends_to_the_log(job: Job) -> None:
    (job.folder / "log.txt").write_text("before\n")
    assert work(job.folder) == 2, "as argparse ends"
    assert json.loads((job.folder / "process.json").read_text()) == {"pid": os.getpid()}
    assert (job.state, job.log().startswith("before\n")) == ("failed", True)
    assert "unrecognized arguments: --sepia" in job.failure()


@pytest.mark.usefixtures("here")
def test_only_one_worker_runs_a_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FileLock", lambda path, timeout: FileLock(path, timeout=0))
    with FileLock(job.folder / "lock"):
        assert work(job.folder) == 75
        assert job.state == "running"
    assert sorted(path.name for path in job.folder.iterdir() if path.name != "lock") == ["job.json"]


@pytest.mark.usefixtures("here")
def test_exit_with_a_message_is_a_failure(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(words: list[str]) -> int:
        raise SystemExit("no such thing")

    monkeypatch.setattr("veneer.cli.main", main)
    assert work(job.folder) == 1
    assert job.state == "failed"


@pytest.mark.usefixtures("here")
def test_worker_resumes_in_the_job_folder_and_stop_is_no_failure(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def main(words: list[str]) -> int:
        given.append(words)
        (job.folder / "stop").touch()
        return 0

    monkeypatch.setattr("veneer.cli.main", main)
    assert job.state == "waiting"
    assert work(job.folder) == 0
    assert given == [[*WRONG, "--out", str(job.run), "--resume"]]
    assert job.state == "stopped"
    job.run.mkdir()
    (job.run / "result.json").write_text("{}")
    assert job.state == "done", "it was at its end when it was stopped"


@pytest.mark.usefixtures("here")
def test_worker_sees_a_stop_after_writing_its_process_id(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal of a stop arrives before the process handles it."""
    write = worker.write_json

    def written(path: Path, value: Any) -> None:
        write(path, value)
        (job.folder / "stop").touch()

    monkeypatch.setattr(worker, "write_json", written)
    assert work(job.folder) == 0
    assert (job.state, job.log(), (job.folder / "end.json").exists()) == ("stopped", "", False)


def test_outliving_job_leaves_no_resource_warning(job: Job) -> None:
    """The process of a job is reaped when it ends; one that outlives the server causes no warning."""
    start = """
import gc, sys, time
from pathlib import Path
from veneer.apps import jobs
first, second = map(Path, sys.argv[1:])
assert jobs.Job(first).start()
jobs._processes[0].kill()
end = time.monotonic() + 60
while jobs._processes[0].returncode is None and time.monotonic() < end:
    time.sleep(0.05)  # nobody polls or waits here
print(jobs._processes[0].returncode)
assert jobs.Job(second).start()
jobs._processes.clear()
gc.collect()
"""
    other = jobs.create_job(job.folder.parent, "train", "another", WRONG)
    with FileLock(other.folder / "lock"):  # its process waits for the lock, so it outlives the server
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", start, str(job.folder), str(other.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
    assert int(done.stdout) == -signal.SIGKILL


def test_jobs_of_the_earlier_page_name_are_found(tmp_path: Path) -> None:
    assert jobs.create_job(tmp_path, "teach", "a toy", WRONG).kind == "train"
    assert jobs.create_job(tmp_path, "control", "edges", WRONG).kind == "control"
