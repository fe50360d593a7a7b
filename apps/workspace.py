"""Where the files of a visitor lie, and under which names."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from veneer.injection import VeneerError

from .jobs import Job, find
from .limits import LIMITS

ALONE = "local"
"""The user of an app without a login."""


@dataclass(frozen=True)
class Workspace:
    """The files of one user: `jobs/` and `adapters/`, in a folder that no other user's pages look into.

    Args:
        root: of all users. `user`: name of a login; None for an app without one.
    """

    root: Path
    user: str | None = None

    @property
    def folder(self) -> Path:
        """`root/local`, or the start of the name's digest, so that no name leads elsewhere and no two meet."""
        if self.user is None:
            return self.root / ALONE
        return self.root / f"user-{hashlib.sha256(self.user.encode()).hexdigest()[:20]}"

    @property
    def jobs(self) -> Path:
        """Folder of training jobs."""
        return self.folder / "jobs"

    @property
    def adapters(self) -> Path:
        """Folder of files that were brought along."""
        return self.folder / "adapters"

    def all_jobs(self) -> list[Job]:
        """The newest first."""
        return find(self.jobs)

    def job(self, name: str) -> Job:
        """A job by its name.

        Raises:
            VeneerError: this user has none of that name.
        """
        found = next((job for job in self.all_jobs() if job.name == name), None)
        if found is None:
            raise VeneerError(f"there is no job {shown(name)!r} of yours; it may have been deleted. Choose one of the list.")
        return found

    def all_adapters(self) -> dict[str, Path]:
        """What can be drawn with, by a name for people: jobs' own, and files that were brought along."""
        found = {}
        for job in self.all_jobs():
            file = job.run / "adapter.safetensors"
            if file.exists():
                found[f"{job.about.get('title', job.name)} ({job.name})"] = file
        for path in sorted(self.adapters.glob("*.safetensors")):
            found[path.stem] = path
        return found

    def adapter(self, name: str) -> Path:
        """A file by its name in `all_adapters`.

        Raises:
            VeneerError: this user has none of that name.
        """
        found = self.all_adapters().get(name)
        if found is None:
            raise VeneerError(f"there is no adapter {shown(name)!r} of yours. Choose one of the list, or bring its file.")
        return found

    def waiting(self) -> int:
        """Jobs of this user that are not at an end."""
        return sum(job.state in ("waiting", "running") for job in self.all_jobs())


def safe(name: str, otherwise: str = "file") -> str:
    """A name that is a file's name and nothing else: letters, digits, `.`, `-` and `_`, at most 80, no dot in front.

    >>> safe("../../my cat.safetensors")
    'my-cat.safetensors'
    """
    last = re.split(r"[\\\\/]", name)[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:80]
    return plain or otherwise


def bounded(text: str, what: str) -> str:
    """A visitor's words, if they are no longer than is allowed and hold nothing that no keyboard gives.

    Raises:
        VeneerError: too long, or with control characters.
    """
    if len(text) > LIMITS.text:
        raise VeneerError(f"{what}: {len(text):,} characters; expected at most {LIMITS.text:,}. Shorten it.")
    if any(ord(c) < 32 and c not in "\n\t" for c in text):
        raise VeneerError(f"{what}: it has characters that cannot be shown; expected plain text. Type it anew.")
    return text.strip()


def shown(text: str) -> str:
    """At most 60 characters of a visitor's words, for messages."""
    return text if len(text) <= 60 else text[:57] + "…"
