"""Paths of the files that are uploaded: inside the folder of the run, also behind links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from veneer.injection.errors import VeneerError


def check_inside(folder: Path, name: str, where: str = "files") -> Path:
    """Path of a file of a run.

    Args:
        folder: of the run. `name`: relative path in it. `where`: what has the name, for the error.
    Raises:
        VeneerError: an absolute path, one with `..`, or a link to a file outside the folder.
    """
    parts = PurePosixPath(name).parts
    has_form = bool(parts) and ".." not in parts and not parts[0].startswith("/") and "\\" not in name and ":" not in name
    if not has_form or not (folder / name).resolve().is_relative_to(folder.resolve()):
        message = f"{folder}: {where} has {name!r}; expected a relative path of a file inside the folder, and no link out of it."
        raise VeneerError(
            f"{message} Replace it by a copy.", file=folder, where=where, given=name, expected="a file in the folder of the run"
        )
    return folder / name


def sample_records(folder: Path, record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Records of the generated images of a run whose files exist.

    Raises:
        VeneerError: a record that names no PNG file inside the folder.
    """
    for each in record.get("samples") or ():
        name = each.get("file") if isinstance(each, Mapping) else None
        if not isinstance(name, str) or not name.endswith(".png"):
            message = f"{folder}: samples in result.json has the file {name!r}; expected a PNG file. Correct or remove the entry."
            raise VeneerError(message, file=folder, where="samples", given=name, expected=".png")
        if check_inside(folder, name, "samples").is_file():
            yield each
