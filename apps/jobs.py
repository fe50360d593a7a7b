"""Training jobs as folders: command, state and progress.

All state is in files, so a reloaded page, a second tab and a restarted server see the same jobs.

| file | content |
|---|---|
| `job.json` | command, title and creation time |
| `run/` | output folder of the command: `progress.jsonl`, `previews/`, checkpoints, `adapter.safetensors`, `result.json` |
| `log.txt` | output of the command |
| `lock` | file lock held by the job's process; the system releases it when the process dies |
| `process.json` | process ID |
| `begun.json` | step at which each process started |
| `end.json` | exit status of the last process that exited, or why the job is not restarted |
| `stop` | present if the user stopped the job |
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from veneer.atomic_files import write_json
from veneer.training.report.phases import Phase, read_phase
from veneer.training.report.progress import Progress, read_progress

State = Literal["waiting", "running", "stopped", "done", "failed"]
LOG_LIMIT = 4000
"""Characters read from the end of the log."""
LOCK_TIMEOUT = 0.02
"""Seconds to wait for a lock; readers hold it for less."""
OUT_OF_MEMORY = "the machine may be out of memory. Choose a smaller base model, batch size or resolution, and start again."
MAX_ATTEMPTS = 3
"""Processes that may die at the same step before the job counts as failed."""

_processes: list[subprocess.Popen[bytes]] = []


def has_live_process() -> bool:
    """True if a job process started by this server is running, even if it does not hold its lock yet."""
    _processes[:] = [process for process in _processes if process.poll() is None]
    return bool(_processes)


@dataclass(frozen=True)
class Job:
    """A training job, identified by its folder.

    >>> Job(Path("jobs/20260101-120000-ab12cd34")).name
    '20260101-120000-ab12cd34'
    """

    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder: creation time and a random suffix."""
        return self.folder.name

    @property
    def run(self) -> Path:
        """Output folder of the command."""
        return self.folder / "run"

    @property
    def metadata(self) -> dict[str, Any]:
        """Content of `job.json`: `kind`, `title`, `words` (the command) and `made` (creation time in seconds)."""
        return _json(self.folder / "job.json")

    @property
    def kind(self) -> str:
        """Slug of the page that created the job."""
        kind = str(self.metadata.get("kind", ""))
        return "train" if kind == "teach" else kind  # the earlier name of that page

    @property
    def command(self) -> list[str]:
        """Command line without `--out` and `--resume`."""
        return list(self.metadata.get("words", []))

    @property
    def title(self) -> str:
        """Title shown to users."""
        return str(self.metadata.get("title") or self.name)

    @property
    def created(self) -> str:
        """Creation time as text, such as `27 Nov 12:46`."""
        created = self.metadata.get("made")
        return time.strftime("%d %b %H:%M", time.localtime(created)) if isinstance(created, int | float) else self.name

    @property
    def state(self) -> State:
        """State of the job, derived from the files in its folder."""
        if is_locked(self.folder / "lock"):
            return "running"
        if (self.run / "result.json").exists():
            return "done"
        end = _json(self.folder / "end.json")
        if end.get("status"):
            return "failed"
        return "stopped" if (self.folder / "stop").exists() else "waiting"

    @property
    def was_started(self) -> bool:
        """True if a process has run the job before. A waiting job that was started is an interrupted one."""
        return (self.folder / "log.txt").exists()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run; 0 if it has not ended or was run by several processes."""
        try:
            start, end = ((self.folder / name).stat().st_mtime for name in ("process.json", "end.json"))
        except OSError:
            return 0.0
        return max(0.0, end - start) if len(_json(self.folder / "begun.json").get("steps", [])) == 1 else 0.0

    def progress(self) -> list[Progress]:
        """Training steps logged so far."""
        return read_progress(self.run / "progress.jsonl")

    def phase(self) -> Phase | None:
        """Current phase other than training, such as evaluation; None during training and before the first report."""
        phase = read_phase(self.run / "progress.jsonl")
        return None if phase is None or phase.phase == "training" else phase

    def previews(self) -> list[Path]:
        """Preview image grids, oldest first."""
        return sorted((self.run / "previews").glob("step-*.png"))

    def log(self) -> str:
        """End of the command's output."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace")[-LOG_LIMIT:] if path.exists() else ""

    def failure(self) -> str:
        """Error message of a failed job; empty for other states."""
        if self.state != "failed":
            return ""
        reason: str = _json(self.folder / "end.json").get("why", "")
        lines = self.log().strip().splitlines()
        messages = [line.removeprefix("veneer: ") for line in lines if line.startswith("veneer: ")]
        return reason or (messages or lines or ["The process ended without a message."])[-1]

    def start(self) -> bool:
        """Starts a process that outlives the server. Returns False if `MAX_ATTEMPTS` processes died at the same step."""
        steps = self.progress()
        started_at = [*_json(self.folder / "begun.json").get("steps", []), steps[-1].step if steps else 0]
        (self.folder / "process.json").unlink(missing_ok=True)
        if len(started_at) > MAX_ATTEMPTS and len(set(started_at[-MAX_ATTEMPTS - 1 :])) == 1:
            write_json(
                self.folder / "end.json",
                {"status": 1, "why": f"It died {MAX_ATTEMPTS} times at step {started_at[-1]}: {OUT_OF_MEMORY}"},
            )
            return False
        write_json(self.folder / "begun.json", {"steps": started_at})
        devnull = subprocess.DEVNULL
        command = [sys.executable, "-m", "veneer.apps.worker", str(self.folder)]
        process = subprocess.Popen(command, stdin=devnull, stdout=devnull, stderr=devnull, start_new_session=True)
        _processes.append(process)
        # Reaps the process as soon as it ends.
        threading.Thread(target=process.wait, name=f"veneer-{self.name}", daemon=True).start()
        return True

    def stop(self) -> None:
        """Requests a stop after the current step; the trained weights are saved."""
        (self.folder / "stop").touch()  # first: the process checks for this file right after it has written its ID
        pid = _json(self.folder / "process.json").get("pid")
        if pid and is_locked(self.folder / "lock"):
            with contextlib.suppress(ProcessLookupError):  # the process has ended in the meantime
                os.kill(pid, signal.SIGTERM)

    def resume(self) -> None:
        """Puts a stopped or failed job back into the queue."""
        for name in ("stop", "end.json", "begun.json"):
            (self.folder / name).unlink(missing_ok=True)


def create_job(jobs: Path, kind: str, title: str, words: Sequence[str]) -> Job:
    """Creates a job in the waiting state.

    Args:
        jobs: folder of all jobs of a user. `kind`: slug of the page. `title`: shown to users.
        words: the command without `--out` and `--resume`, which the worker adds. The output folder is `run`.
    """
    folder = jobs / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    write_json(folder / "job.json", {"kind": kind, "title": title, "words": list(words), "made": time.time()})
    return Job(folder)


def find_jobs(jobs: Path) -> list[Job]:
    """All jobs of a folder, newest first."""
    all_jobs = [Job(path.parent) for path in jobs.glob("*/job.json")]
    return sorted(all_jobs, key=lambda job: (job.metadata.get("made", 0), job.name), reverse=True)


def is_locked(path: Path) -> bool:
    """True if a job process holds the lock. Other readers hold it for less than `LOCK_TIMEOUT`."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=LOCK_TIMEOUT, poll_interval=LOCK_TIMEOUT / 4):
            return False
    except Timeout:
        return True


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
