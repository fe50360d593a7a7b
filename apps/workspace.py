"""Where the files of a visitor lie, and under which names."""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from veneer.injection import OptionError, UnknownName, VeneerError

from .jobs import Job, find
from .limits import LIMITS

ALONE = "local"
"""The user of an app without a login."""
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")}
"""Names of devices, which are no file's name on Windows."""


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

    @property
    def given(self) -> Path:
        """Folder of what jobs learn from: a folder for each, which goes when its job is deleted."""
        return self.folder / "given"

    def new_given(self) -> Path:
        """A new folder in `given`, for one job."""
        self.given.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.given))

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
            message = f"there is no job {shown(name)!r} of yours; it may have been deleted. Choose one of the list."
            raise UnknownName(message, name, "job")
        return found

    def all_adapters(self) -> dict[str, Path]:
        """What can be drawn with, by a name for people: jobs' own, the newest first, and files that were brought along."""
        named: dict[str, Path] = {}
        for job in reversed(self.all_jobs()):  # the oldest first: a name stays when another job gets the same title
            name = f"{job.title} · {job.when}"
            named[f"{name} ({job.name[-8:]})" if name in named else name] = job.run / "adapter.safetensors"
        taught = {name: file for name, file in reversed(named.items()) if file.exists()}
        return taught | {path.stem: path for path in sorted(self.adapters.glob("*.safetensors"))}

    def adapter(self, name: str) -> Path:
        """A file by its name in `all_adapters`.

        Raises:
            VeneerError: this user has none of that name.
        """
        found = self.all_adapters().get(name)
        if found is None:
            message = f"there is no adapter {shown(name)!r} of yours. Choose one of the list, or bring its file."
            raise UnknownName(message, name, "adapter")
        return found

    def waiting(self) -> int:
        """Jobs of this user that are not at an end."""
        return sum(job.state in ("waiting", "running") for job in self.all_jobs())

    def check_room(self) -> None:
        """See that one more job may wait.

        Raises:
            VeneerError: as many as are allowed wait or run.
        """
        if self.waiting() >= LIMITS.jobs:
            message = f"{LIMITS.jobs} of your jobs wait or run already. Wait for one to end, or stop one."
            raise VeneerError(message, where="jobs", given=self.waiting(), expected=LIMITS.jobs)


def safe(name: str, otherwise: str = "file") -> str:
    """A name that is a file's name on every system and nothing else: letters and digits of any script, `.`, `-` and `_`.

    At most 80 characters and 160 bytes, no dot in front. Of a path the last part; what no system gives to a file (`con`, `aux`)
    gets an `x-` in front. Where nothing is left, a digest tells one name from another.

    >>> safe("../../my cat.safetensors"), safe("猫?"), safe("CON.png")
    ('my-cat.safetensors', '猫', 'x-CON.png')
    """
    last = re.split(r"[\\/]", name)[-1]
    known = unicodedata.normalize("NFC", last)
    plain = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in known)
    plain = _cut("-".join(plain.split()).strip("-."))
    if not plain:
        return f"{otherwise}-{hashlib.sha256(last.encode(errors='replace')).hexdigest()[:8]}" if last.strip(". ") else otherwise
    return f"x-{plain}" if plain.split(".")[0].casefold() in RESERVED else plain


def _cut(name: str) -> str:
    """The start of a long name, with its ending."""
    stem, dot, ending = name.rpartition(".")
    ending = f".{ending}" if dot and stem and len(ending) <= 12 and ending.isascii() else ""
    stem = name[: len(name) - len(ending)][: 80 - len(ending)]
    stem = stem.encode()[: 160 - len(ending)].decode(errors="ignore")
    return (stem.rstrip("-. ") + ending).strip("-.")


def bounded(text: str, what: str) -> str:
    """A visitor's words, if they are no longer than is allowed and hold nothing that no keyboard gives.

    Raises:
        VeneerError: too long, or with control characters or halves of characters.
    """
    if len(text) > LIMITS.text:
        message = f"{what}: {len(text):,} characters; expected at most {LIMITS.text:,}. Shorten it."
        raise OptionError(message, option=what, given=len(text), expected=LIMITS.text)
    text = text.replace("\r\n", "\n")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
        message = f"{what}: it has characters that cannot be shown; expected plain text. Type it anew."
        raise OptionError(message, option=what, given=shown(text), expected="plain text")
    return text.strip()


def shown(text: str, most: int = 60) -> str:
    """At most 60 characters of a visitor's words, for messages; what turns or breaks a line is a question mark."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return plain if len(plain) <= most else plain[: most - 3] + "…"
