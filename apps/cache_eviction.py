"""Eviction of the cache of uploaded and displayed files: oldest first, until its size is within a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from .job_queue import JobQueue
from .polling_thread import PollingThread

MIN_AGE = 900.0
"""Seconds for which a file stays: an open form or a check before a run (at most `LIMITS.check_seconds`) may use it."""
INTERVAL = 60.0
"""Seconds between evictions."""


@dataclass(frozen=True)
class _CachedFile:
    path: Path
    size: int
    modified: float


def evict(folders: Sequence[Path], limit: int, keep: Collection[Path] = (), min_age: float = MIN_AGE) -> list[Path]:
    """Deletes the oldest files of the folders until the rest has at most `limit` bytes. Returns the deleted files.

    Args:
        keep: files and folders that are in use. `min_age`: seconds since the last change before a file may be deleted.
    """
    files = sorted((file for folder in folders for file in _files(folder)), key=lambda file: file.modified)
    total, now, deleted = sum(file.size for file in files), time.time(), list[Path]()
    used = {path.resolve() for path in keep}
    for file in files:
        if total <= limit or now - file.modified < min_age:
            break
        if used & {file.path, *file.path.parents}:
            continue
        file.path.unlink(missing_ok=True)
        total -= file.size
        deleted.append(file.path)
    return deleted


def _files(folder: Path) -> list[_CachedFile]:
    files = []
    for path in folder.resolve().rglob("*"):
        try:
            status = path.lstat()
        except OSError:  # deleted meanwhile
            continue
        if path.is_file() or path.is_symlink():
            files.append(_CachedFile(path, status.st_size, status.st_mtime))
    return files


def paths_in_use(queue: JobQueue) -> set[Path]:
    """Paths in the commands of all jobs that wait or run."""
    words = {word for job in queue.jobs() if job.state in ("waiting", "running") for word in job.command}
    parts = {part for word in words for part in (word, word.partition("=")[2], word.rpartition(":")[0])}
    return {Path(part) for part in parts if part.startswith("/")}


class CacheEviction(PollingThread):
    """Thread that evicts the cache every `seconds`.

    Args:
        limit: bytes of the folders together. `in_use`: files and folders to keep.
    """

    def __init__(
        self, folders: Sequence[Path], limit: int, in_use: Callable[[], Collection[Path]], seconds: float = INTERVAL
    ) -> None:
        super().__init__("veneer-cache", seconds)
        self.folders, self.limit, self.in_use = folders, limit, in_use

    def poll(self) -> None:
        evict(self.folders, self.limit, self.in_use())
