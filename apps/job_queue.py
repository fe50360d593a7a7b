"""Queue of training jobs: one runs at a time over all users. Its state is in files, so it survives a restart of the server."""

from __future__ import annotations

from pathlib import Path

from .jobs import Job, find_jobs, has_live_process
from .polling_thread import PollingThread


class JobQueue(PollingThread):
    """Thread that starts waiting jobs, oldest first.

    After a crash of the server, a job that still runs is waited for, and an interrupted job is resumed. After `close`, a running
    job continues.

    Args:
        root: folder of all workspaces; jobs are in `root/*/jobs/*`. `seconds`: polling interval.
    """

    def __init__(self, root: Path, seconds: float = 0.5) -> None:
        super().__init__("veneer-jobs", seconds)
        self.root = root

    def jobs(self) -> list[Job]:
        """Jobs of all users, oldest first."""
        return [job for folder in self.root.glob("*/jobs") for job in find_jobs(folder)][::-1]

    def position(self, job: Job) -> int:
        """Number of waiting jobs ahead of this one."""
        waiting = sorted((j for j in self.jobs() if j.state == "waiting"), key=_creation_time)
        names = [j.folder for j in waiting]
        return names.index(job.folder) if job.folder in names else 0

    def start_next(self) -> Job | None:
        """Starts the oldest waiting job if none runs, and returns it."""
        if has_live_process():
            return None
        jobs = [(job, job.state) for job in self.jobs()]
        waiting = sorted((job for job, state in jobs if state == "waiting"), key=_creation_time)
        if not waiting or any(state == "running" for _, state in jobs):
            return None
        waiting[0].start()
        return waiting[0]

    def poll(self) -> None:
        self.start_next()


def _creation_time(job: Job) -> float:
    return float(job.metadata.get("made", 0))
