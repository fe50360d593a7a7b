"""Process of one job: `python -m veneer.apps.worker FOLDER` runs the job's command and records its exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

from filelock import FileLock, Timeout

from veneer.allocator import keep_freed_memory
from veneer.atomic_files import write_json

from .jobs import Job


def work(folder: Path) -> int:
    """Runs the job's command to its end, resuming from its last checkpoint. Returns the exit status.

    The process holds the job's lock while it runs, so that no second process runs the job and others can tell that it is alive.
    """
    from veneer.cli import main

    job = Job(folder)
    if not job.command:
        return 0  # deleted before this process began: the lock would create the folder again
    lock = FileLock(folder / "lock", timeout=5)
    try:
        lock.acquire()
    except Timeout:
        return 75  # another process runs this job
    with lock, (folder / "log.txt").open("a", buffering=1) as log:
        write_json(folder / "process.json", {"pid": os.getpid()})
        if (folder / "stop").exists():
            return 0
        command = [*job.command, "--out", str(job.run), "--resume"]
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                status = main(command)
            except SystemExit as end:  # flags that argparse rejects
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                status = 1
        write_json(folder / "end.json", {"status": status})
    return status


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(work(Path(sys.argv[1])))
