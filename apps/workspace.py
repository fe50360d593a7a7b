"""Workspace of a user: folders, jobs, adapters and safe file names."""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.injection import OptionError, StateError, UnknownName, VeneerError

from .jobs import Job, find_jobs
from .limits import LIMITS
from .quotas import check_storage

CACHE, UPLOADS = "cache", "uploads"
"""Folder of uploaded and displayed files beside the workspaces, and the folder in it with one of uploads for each login."""
LOCAL_USER = "local"
"""Folder name of the only user of an app without logins."""
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")}
"""Device names, which are invalid file names on Windows."""


@dataclass(frozen=True)
class Workspace:
    """Files of one user: jobs, adapters and datasets, in a folder that other users cannot access.

    Args:
        root: folder of all workspaces. `user`: login name, or None in an app without logins.
        stored_limit: quota of stored bytes; None for none.
    """

    root: Path
    user: str | None = None
    stored_limit: int | None = None

    @property
    def folder(self) -> Path:
        """`root/local`, or a folder named by a digest of the login, so that any login gives a safe and unique path."""
        if self.user is None:
            return self.root / LOCAL_USER
        return self.root / f"user-{hashlib.sha256(self.user.encode()).hexdigest()[:20]}"

    @property
    def jobs(self) -> Path:
        """Folder of training jobs."""
        return self.folder / "jobs"

    @property
    def adapters(self) -> Path:
        """Folder of uploaded and converted adapters."""
        return self.folder / "adapters"

    @property
    def datasets(self) -> Path:
        """Folder of training data: one folder per job, deleted together with its job."""
        return self.folder / "given"

    def new_dataset(self) -> Path:
        """Creates a folder in `datasets` for one job."""
        self.datasets.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.datasets))

    def datasets_in(self, command: Sequence[str]) -> set[Path]:
        """Folders in `datasets` that a command names, also inside an option such as `path=FOLDER,concept=<toy>`."""
        pattern = re.compile(rf"(?:^|=)({re.escape(str(self.datasets))}/[^/,]+)(?=$|,)")
        folders = {Path(match) for word in command for match in pattern.findall(word)}
        return {folder for folder in folders if folder.resolve().parent == self.datasets.resolve()}

    def all_jobs(self) -> list[Job]:
        """All jobs of the user, newest first."""
        return find_jobs(self.jobs)

    def job(self, name: str) -> Job:
        """Finds a job by name.

        Raises:
            VeneerError: the user has no job of that name.
        """
        match = next((job for job in self.all_jobs() if job.name == name), None)
        if match is None:
            message = f"you have no job {printable(name)!r}; it may have been deleted. Choose one from the list."
            raise UnknownName(message, name, "job")
        return match

    def all_adapters(self) -> dict[str, Path]:
        """Display name to file of all adapters: those of jobs, newest first, then uploaded and converted ones."""
        names: dict[str, Path] = {}
        for job in reversed(self.all_jobs()):  # oldest first: a name stays stable when a later job has the same title
            name = f"{job.title} · {job.created}"
            names[f"{name} ({job.name[-8:]})" if name in names else name] = job.run / "adapter.safetensors"
        trained = {name: file for name, file in reversed(names.items()) if file.exists()}
        return trained | {path.stem: path for path in sorted(self.adapters.glob("*.safetensors"))}

    def adapter(self, name: str) -> Path:
        """Finds an adapter file by its name in `all_adapters`.

        Raises:
            VeneerError: the user has no adapter of that name.
        """
        file = self.all_adapters().get(name)
        if file is None:
            message = f"you have no adapter {printable(name)!r}. Choose one from the list, or upload its file."
            raise UnknownName(message, name, "adapter")
        return file

    def check_storage(self, more: int = 0) -> None:
        """Checks that the user may store `more` bytes.

        Raises:
            QuotaError: the files of the user, with their uploads, would exceed the quota.
        """
        if self.stored_limit is not None:
            check_storage([self.folder, self.root / CACHE / UPLOADS / self.folder.name], self.stored_limit, more)

    def check_unused(self, path: Path) -> None:
        """Checks that no waiting or running job of the user, other than one in this folder, reads a file or folder.

        Raises:
            StateError: a job does.
        """
        for job in self.all_jobs():
            if job.folder != path and job.state in ("waiting", "running") and any(str(path) in word for word in job.command):
                message = f"the run {printable(job.title)!r} trains from or on top of it. Stop that run first."
                raise StateError(message, where=path.name, given=job.name, expected="unused")

    def count_active(self) -> int:
        """Number of waiting and running jobs of the user."""
        return sum(job.state in ("waiting", "running") for job in self.all_jobs())

    def check_queue(self) -> None:
        """Checks that the user may submit another job.

        Raises:
            VeneerError: the maximum number of jobs wait or run, or the files of the user exceed the quota.
        """
        self.check_storage()
        if self.count_active() >= LIMITS.jobs:
            message = f"{LIMITS.jobs} of your jobs are already waiting or running. Wait for one to end, or stop one."
            raise VeneerError(message, where="jobs", given=self.count_active(), expected=LIMITS.jobs)


def safe_name(name: str, default: str = "file") -> str:
    """Converts text to a valid file name on every system: letters and digits of any script, `.`, `-` and `_`.

    At most 80 characters and 160 bytes, without a leading dot. Of a path only the last part counts; reserved names (`con`,
    `aux`) get the prefix `x-`. If no character is left, a digest keeps names distinct.

    >>> safe("../../my cat.safetensors"), safe("猫?"), safe("CON.png")
    ('my-cat.safetensors', '猫', 'x-CON.png')
    """
    last = re.split(r"[\\/]", name)[-1]
    normalized = unicodedata.normalize("NFC", last)
    plain = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in normalized)
    plain = _cut("-".join(plain.split()).strip("-."))
    if not plain:
        return f"{default}-{hashlib.sha256(last.encode(errors='replace')).hexdigest()[:8]}" if last.strip(". ") else default
    return f"x-{plain}" if plain.split(".")[0].casefold() in RESERVED else plain


def _cut(name: str) -> str:
    """Truncates a long name and keeps its suffix."""
    stem, dot, ending = name.rpartition(".")
    ending = f".{ending}" if dot and stem and len(ending) <= 12 and ending.isascii() else ""
    stem = name[: len(name) - len(ending)][: 80 - len(ending)]
    stem = stem.encode()[: 160 - len(ending)].decode(errors="ignore")
    return (stem.rstrip("-. ") + ending).strip("-.")


def check_text(text: str, option: str, limit: int = LIMITS.text) -> str:
    """Checks text typed by a user, at most `limit` characters, and strips surrounding whitespace.

    Raises:
        VeneerError: the text is too long, or contains control characters or unpaired surrogates.
    """
    if len(text) > limit:
        message = f"{option}: {len(text):,} characters; expected at most {limit:,}. Shorten it."
        raise OptionError(message, option=option, given=len(text), expected=limit)
    text = text.replace("\r\n", "\n")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
        message = f"{option}: the text has control characters; expected plain text. Type it again."
        raise OptionError(message, option=option, given=printable(text), expected="plain text")
    return text.strip()


def printable(text: str, most: int = 60) -> str:
    """Shortens a user's text for messages, and replaces control and direction characters by question marks."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return plain if len(plain) <= most else plain[: most - 3] + "…"
