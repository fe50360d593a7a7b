"""Disk space of a run: free space, and a reserve that is released before the last files are written."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from veneer.injection.errors import VeneerError

from .checkpoints import CheckpointWarning

T = TypeVar("T")
CHUNK = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error codes of a disk without space: full, quota exceeded, or file too large."""


class DiskFull(VeneerError):
    """A file of a run could not be written.

    Attributes:
        file: its name. `kept`: names of the newest intact files of the run.
    """

    def __init__(self, file: str, kept: tuple[str, ...] = ()) -> None:
        self.kept = kept
        there = f"{' and '.join(kept)} {'is' if len(kept) == 1 else 'are'} kept" if kept else "no checkpoint was kept"
        then = "Free space and run the same command with --resume." if kept else "Free space and train again."
        super().__init__(f"the disk is full: {file} could not be written; {there}. {then}", file=file)


def free_bytes(folder: Path | None) -> int | None:
    """Bytes available to a run on the disk of its folder: the free ones, and those of its checkpoints and weights, which a
    resumed run replaces. None without a folder."""
    if folder is None:
        return None
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    replaced = [*folder.glob("*.safetensors"), *folder.glob("checkpoint-*/**/*"), *folder.glob(".reserve")]
    return shutil.disk_usage(existing).free + sum(file.stat().st_size for file in replaced if file.is_file())


class Reserve:
    """A file in the folder of a run that reserves disk space for its last files.

    Args:
        folder: folder of the run. `size`: bytes, at most half of the free space.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.path, self.size = folder / ".reserve", size

    def take(self) -> bool:
        """Allocates the file; returns False and warns if there is no space."""
        self.release()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _allocate(self.path, min(self.size, shutil.disk_usage(self.path.parent).free // 2))
        except OSError as error:
            self.release()
            message = f"no disk space could be reserved ({error.strerror})"
            warnings.warn(CheckpointWarning(message, given=error.errno), stacklevel=2)
            return False
        return True

    def release(self) -> None:
        """Deletes the file if it exists."""
        self.path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> None:
    """Writes a file with allocated blocks; a sparse file would reserve nothing."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, CHUNK):
            file.write(bytes(min(CHUNK, size - start)))


def is_full(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False


@contextmanager
def writing(folder: Path, file: str) -> Iterator[None]:
    """Converts full-disk errors to `DiskFull`, which lists the intact files of the run.

    Args:
        folder: folder of the run. `file`: name of the file being written.
    """
    try:
        yield
    except (OSError, VeneerError) as error:
        if not is_full(error):
            raise
        kept = [name for name in ("adapter.safetensors",) if name != file and (folder / name).is_file()]
        kept += [path.name for path in sorted(folder.glob("checkpoint-*"))[-1:]]
        raise DiskFull(file, tuple(kept)) from error


def optional(folder: Path, file: str, action: Callable[[], T], notes: list[str]) -> T | None:
    """Writes an optional file; on a full disk a warning is added to `notes` instead."""
    try:
        with writing(folder, file):
            return action()
    except DiskFull:
        notes.append(f"{file} was not written: the disk is full.")
        return None
