"""Quotas of a visitor with a login: images generated per hour, and stored bytes. Jobs are limited by `LIMITS.jobs`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.injection import OptionError, VeneerError

HOUR = 3600.0
"""Seconds."""
GIB = 2**30


class QuotaError(VeneerError):
    """A request beyond a quota of the user.

    Attributes, beside those of `VeneerError`:
        quota: name of the quota, `images_per_hour` or `stored_bytes`. seconds: until the request is accepted, 0 if files have to
            be deleted.
    """

    def __init__(self, message: str = "", *, quota: str = "", seconds: float = 0.0, **data: Any) -> None:
        super().__init__(message, where=quota, **data)
        self.quota, self.seconds = quota, seconds


@dataclass(frozen=True)
class Quotas:
    """Quotas of each login; an app without logins has none.

    Args:
        images_per_hour: generated images in the last hour. `stored_bytes`: of jobs, adapters, datasets and uploads.
    """

    images_per_hour: int = 600
    stored_bytes: int = 20 * GIB

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if given < 1:
                raise OptionError(f"{name} is {given}; expected at least 1.", option=name, given=given, expected=1)


class ImageCounter:
    """Counts the images that each user generates, over the last hour.

    Args:
        limit: images per hour and user. `clock`: current time in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self._taken: defaultdict[str, deque[tuple[float, int]]] = defaultdict(deque)
        self._lock = threading.Lock()

    def take(self, user: str | None, count: int) -> None:
        """Counts the images of a request at its start. The user of an app without logins, None, has no quota.

        Raises:
            QuotaError: with those of the last hour, they are more than the limit; `seconds` is the time until they are not.
        """
        if user is None:
            return
        with self._lock:
            taken, now = self._taken[user], self.clock()
            while taken and taken[0][0] <= now - HOUR:
                taken.popleft()
            if (used := sum(images for _, images in taken)) + count > self.limit:
                raise self._error(taken, used, count, now)
            taken.append((now, count))

    def _error(self, taken: deque[tuple[float, int]], used: int, count: int, now: float) -> QuotaError:
        left, wait = used, HOUR if count > self.limit else 0.0
        for begin, images in taken if count <= self.limit else ():
            left, wait = left - images, begin + HOUR - now
            if left + count <= self.limit:
                break
        advice = "Choose fewer." if count > self.limit else f"Wait {max(1, round(wait / 60))} min, or choose fewer."
        message = f"{count} more images after {used} in the last hour; expected at most {self.limit} per hour. {advice}"
        return QuotaError(message, quota="images_per_hour", given=used + count, expected=self.limit, seconds=wait)


def check_storage(folders: list[Path], limit: int, more: int = 0) -> None:
    """Checks that the files of a user, and `more` bytes, are within the quota.

    Args:
        folders: of the user. `limit`: in bytes.
    Raises:
        QuotaError: they are not.
    """
    used = sum(map(stored_bytes, folders))
    if used + more > limit:
        message = (
            f"your files have {used / GIB:.2f} GiB, and {more / GIB:.2f} GiB are to be added; expected at most "
            f"{limit / GIB:.2f} GiB. Delete runs or adapters first."
        )
        raise QuotaError(message, quota="stored_bytes", given=used + more, expected=limit)


def stored_bytes(folder: Path) -> int:
    """Total size of the files in a folder; those that are deleted meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total
