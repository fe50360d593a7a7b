"""Tells repositories of the model hub from files and folders of this machine in the record of a run."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from veneer.hub import parse_name


def is_public_name(text: str, source: Any = None, repo_type: str = "model") -> bool:
    """True if a text is surely a repository of the hub; the form of a name alone proves nothing.

    Args:
        text: base model or data, as recorded. `source`: `hub` or `local` if the run recorded it, else None, and then the hub's
            local cache must have the repository.
        repo_type: `model` or `dataset`.
    """
    from huggingface_hub import constants, file_download

    name = parse_name(text)
    if name is None or source not in (None, "hub"):
        return False
    folder = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=name.repo, repo_type=repo_type)
    return source == "hub" or (not Path(text).exists() and (folder / "snapshots").is_dir())


def public_file(text: str) -> str:
    """Name of a file without its folders; of a file in the hub's cache, its name on the hub."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    for index, part in enumerate(parts[:-3]):
        prefix, _, repo = part.partition("--")
        if prefix == "models" and parts[index + 1] == "snapshots":
            name = f"{repo.replace('--', '/')}/{'/'.join(parts[index + 3 :])}"
            return name if parse_name(name) else parts[-1]
    return parts[-1] if parts else ""
