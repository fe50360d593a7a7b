"""Training jobs as folders: what was asked for, whether it waits, runs or has ended, and how it goes.

Everything is in files, so a page that is loaded again, a second tab and a server that is started anew all find the same.

| file | says |
|---|---|
| `job.json` | the command's words, a title, and when it was asked for |
| `run/` | the command's own folder: `progress.jsonl`, `previews/`, checkpoints, `adapter.safetensors`, `result.json` |
| `log.txt` | what the command printed |
| `lock` | held by the process that works on it, so it is let go when that dies, whatever it dies of |
| `process.json` | who works on it |
| `begun.json` | at which step each process began |
| `end.json` | exit status of the last process that ended by itself, or that nobody tries any more |
| `stop` | somebody asked to stop |
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

from veneer.training.loop.checkpoints import write_json
from veneer.training.report.phases import Phase, read_phase
from veneer.training.report.progress import Progress, read_progress

State = Literal["waiting", "running", "stopped", "done", "failed"]
LOG_SHOWN = 4000
"""Characters of the log's end that are read."""
LOOK = 0.02
"""Seconds of asking for a lock: longer than another asks."""
DIED = "perhaps the machine has too little memory for it. Choose a smaller base, batch or picture size, and start again."
TRIES = 3
"""Processes that may die at the same step before nobody tries any more."""

_started: list[subprocess.Popen[bytes]] = []


def beginning() -> bool:
    """Whether a process that this one has begun still lives, be it that it has not got as far as its lock."""
    _started[:] = [process for process in _started if process.poll() is None]
    return bool(_started)


@dataclass(frozen=True)
class Job:
    """A job by its folder.

    >>> Job(Path("jobs/20260101-120000-ab12cd34")).name
    '20260101-120000-ab12cd34'
    """

    folder: Path

    @property
    def name(self) -> str:
        """Of the folder: when it was asked for, and letters that nobody guesses."""
        return self.folder.name

    @property
    def run(self) -> Path:
        """The command's own folder."""
        return self.folder / "run"

    @property
    def about(self) -> dict[str, Any]:
        """What `job.json` says: `kind`, `title`, `words`, `made` (seconds)."""
        return _json(self.folder / "job.json")

    @property
    def title(self) -> str:
        """For people."""
        return str(self.about.get("title") or self.name)

    @property
    def when(self) -> str:
        """Day and time at which it was asked for, such as `27 Nov 12:46`."""
        made = self.about.get("made")
        return time.strftime("%d %b %H:%M", time.localtime(made)) if isinstance(made, int | float) else self.name

    @property
    def state(self) -> State:
        """Where it stands, by what lies in the folder."""
        if held(self.folder / "lock"):
            return "running"
        if (self.run / "result.json").exists():
            return "done"
        end = _json(self.folder / "end.json")
        if end.get("status"):
            return "failed"
        return "stopped" if (self.folder / "stop").exists() else "waiting"

    @property
    def begun(self) -> bool:
        """A process has worked on it: while it waits, a server that was killed left it so."""
        return (self.folder / "log.txt").exists()

    @property
    def seconds(self) -> float:
        """From the start of its process to its end; 0 if it has not ended, or more than one process worked on it."""
        try:
            begun, ended = ((self.folder / name).stat().st_mtime for name in ("process.json", "end.json"))
        except OSError:
            return 0.0
        return max(0.0, ended - begun) if len(_json(self.folder / "begun.json").get("steps", [])) == 1 else 0.0

    def progress(self) -> list[Progress]:
        """Its steps so far."""
        return read_progress(self.run / "progress.jsonl")

    def phase(self) -> Phase | None:
        """What it does beside training steps now; None while it trains, and before it tells anything."""
        phase = read_phase(self.run / "progress.jsonl")
        return None if phase is None or phase.phase == "training" else phase

    def previews(self) -> list[Path]:
        """Sheets that were drawn on the way, the oldest first."""
        return sorted((self.run / "previews").glob("step-*.png"))

    def log(self) -> str:
        """The end of what the command printed."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace")[-LOG_SHOWN:] if path.exists() else ""

    def why(self) -> str:
        """The command's own words on why it failed; nothing for other states."""
        if self.state != "failed":
            return ""
        told: str = _json(self.folder / "end.json").get("why", "")
        lines = self.log().strip().splitlines()
        explained = [line.removeprefix("veneer: ") for line in lines if line.startswith("veneer: ")]
        return told or (explained or lines or ["It ended without a word."])[-1]

    def start(self) -> bool:
        """Begin a process, which lives on when the server ends. False if `TRIES` of them died where this one would begin."""
        steps = self.progress()
        begun = [*_json(self.folder / "begun.json").get("steps", []), steps[-1].step if steps else 0]
        (self.folder / "process.json").unlink(missing_ok=True)
        if len(begun) > TRIES and len(set(begun[-TRIES - 1 :])) == 1:
            write_json(self.folder / "end.json", {"status": 1, "why": f"It died {TRIES} times at step {begun[-1]}: {DIED}"})
            return False
        write_json(self.folder / "begun.json", {"steps": begun})
        quiet = subprocess.DEVNULL
        command = [sys.executable, "-m", "veneer.apps.worker", str(self.folder)]
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        _started.append(process)
        # Reaps the process as soon as it ends, and keeps a reference to it if it outlives this one.
        threading.Thread(target=process.wait, name=f"veneer-{self.name}", daemon=True).start()
        return True

    def stop(self) -> None:
        """Ask it to end after its current step, and to keep what it has learnt."""
        (self.folder / "stop").touch()  # before anything else: the process looks for it once it has said who it is
        process = _json(self.folder / "process.json").get("pid")
        if process and held(self.folder / "lock"):
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(process, signal.SIGTERM)

    def go_on(self) -> None:
        """Let it wait for its turn again: after a stop or a failure."""
        for name in ("stop", "end.json", "begun.json"):
            (self.folder / name).unlink(missing_ok=True)


def make(jobs: Path, kind: str, title: str, words: Sequence[str]) -> Job:
    """A new job that waits.

    Args:
        jobs: folder of all jobs of a user. `kind`: of the page that shows it. `title`: for people.
        words: the command, without `--out` and `--resume`, which are added: its folder is the job's `run`.
    """
    folder = jobs / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    write_json(folder / "job.json", {"kind": kind, "title": title, "words": list(words), "made": time.time()})
    return Job(folder)


def find(jobs: Path) -> list[Job]:
    """All jobs of a folder, the newest first."""
    found = [Job(path.parent) for path in jobs.glob("*/job.json")]
    return sorted(found, key=lambda job: (job.about.get("made", 0), job.name), reverse=True)


def held(path: Path) -> bool:
    """Whether some process holds a lock; one that only looks, as here, does not count."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=LOOK, poll_interval=LOOK / 4):
            return False
    except Timeout:
        return True


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
