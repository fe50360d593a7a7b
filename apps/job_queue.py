"""One training job at a time, over all users: the next begins when none runs. A restart loses nothing, as all is in files."""

from __future__ import annotations

import threading
from pathlib import Path

from .jobs import Job, beginning, find


class JobQueue:
    """A thread that starts what waits.

    Args:
        root: the workspace: jobs are in `root/*/jobs/*`. `seconds`: between two looks.
    A job that a server left behind when it was killed either still runs, and is waited for, or waits, and is resumed.
    """

    def __init__(self, root: Path, seconds: float = 0.5) -> None:
        self.root, self.seconds = root, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="veneer-jobs", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """No more jobs are started; one that runs goes on."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def jobs(self) -> list[Job]:
        """All jobs of all users, the oldest first."""
        return [job for folder in self.root.glob("*/jobs") for job in find(folder)][::-1]

    def place(self, job: Job) -> int:
        """How many jobs begin before it."""
        waiting = sorted((j for j in self.jobs() if j.state == "waiting"), key=_made)
        names = [j.folder for j in waiting]
        return names.index(job.folder) if job.folder in names else 0

    def turn(self) -> Job | None:
        """Start the job that has waited longest if none runs; gives it."""
        if beginning():
            return None
        jobs = [(job, job.state) for job in self.jobs()]
        waiting = sorted((job for job, state in jobs if state == "waiting"), key=_made)
        if not waiting or any(state == "running" for _, state in jobs):
            return None
        waiting[0].start()
        return waiting[0]

    def _loop(self) -> None:
        while not self._ended.wait(self.seconds):
            self.turn()


def _made(job: Job) -> float:
    return float(job.about.get("made", 0))
