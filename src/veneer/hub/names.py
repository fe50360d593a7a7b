"""Names of repositories and files on the hub: `USER/REPO[/FILE][@REVISION]`."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path, PurePath
from typing import NamedTuple

SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Suffixes of files that may be pickles, which can run code when loaded."""
_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>[^@]+))?(?:@(?P<revision>\w[\w./-]*))?")


class RepoName(NamedTuple):
    """A repository, and of a file its path inside and a branch, tag or commit, if the name has them."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


def parse_name(name: str | PathLike[str]) -> RepoName | None:
    """Parts of a hub name; None for a text that is only a path.

    A name of two parts whose last one has the suffix of a weights file is a path, as is one of three parts without it.

    >>> parse_name("user/toy-lora/lora.safetensors@v2")
    RepoName(repo='user/toy-lora', file='lora.safetensors', revision='v2')
    """
    text = name.as_posix() if isinstance(name, PurePath) else str(name)
    match = _NAME.fullmatch(text)
    if match is None or ".." in text.split("/"):
        return None
    found = RepoName(match["repo"], match["file"], match["revision"])
    weights = (SUFFIX, *PICKLES)
    if found.repo.endswith(weights) or (found.file is not None and not found.file.endswith(weights)):
        return None
    return found


def is_repository(name: str | PathLike[str]) -> bool:
    """True if a text has the form of a hub name, and is neither a local path nor in a local folder (`runs/toy` beside `runs`)."""
    path = Path(name).expanduser()
    in_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    return is_hub_name(name) and not path.exists() and not in_folder


def is_hub_name(name: str | PathLike[str]) -> bool:
    """True if a text has the form of a hub name; whether the repository exists is not checked."""
    return parse_name(name) is not None
