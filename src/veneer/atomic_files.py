"""Files that are written as a whole or not at all, also if the power fails."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, record: Any) -> None:
    """Writes a JSON file as `write_atomically` does."""
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def write_atomically(path: Path, data: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Writes the data, or its parts one by one, to a temporary file beside `path`, syncs it, and renames it into place."""
    temporary = path.with_name(f".saving-{path.name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Writes a file and syncs it to the disk."""
    with open(path, "wb") as file:
        for part in [data] if isinstance(data, (bytes, memoryview)) else data:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Syncs a folder where the system supports it, so that renames in it are durable."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
