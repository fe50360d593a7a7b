"""The process that works on one job: `python -m veneer.apps.worker FOLDER` runs the job's command, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

from filelock import FileLock, Timeout

from veneer.allocator import keep_freed_memory
from veneer.training.loop.checkpoints import write_json

from .jobs import Job


def work(folder: Path) -> int:
    """Run the job's command to its end, resuming what is there. Gives its exit status.

    Its lock is held all the time, so that no second process works on it, and everyone sees whether this one lives.
    """
    from veneer.cli import main

    job = Job(folder)
    lock = FileLock(folder / "lock", timeout=5)
    try:
        lock.acquire()
    except Timeout:
        return 75  # somebody works on it
    with lock, (folder / "log.txt").open("a", buffering=1) as log:
        write_json(folder / "process.json", {"pid": os.getpid()})
        if (folder / "stop").exists():
            return 0
        words = [*job.about["words"], "--out", str(job.run), "--resume"]
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                status = main(words)
            except SystemExit as end:  # flags that argparse refuses
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                status = 1
        write_json(folder / "end.json", {"status": status})
    return status


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(work(Path(sys.argv[1])))
