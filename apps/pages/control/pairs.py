"""Training pairs of the page Control: a zip of images and their condition images."""

from __future__ import annotations

import shutil
from pathlib import Path

from veneer.control.image_pairs import find_pairs
from veneer.injection import OptionError, VeneerError

from ...uploads import photo_limits
from ...workspace import Workspace, printable
from ...zip_archives import unpack_zip

PAIRS = "pairs"
"""Condition of the command for map files beside the photos."""
ABOUT = "A zip of pairs has `images/NAME.png` and `conditions/NAME.png`, or `NAME.png` and `NAME.map.png`."


def save_pairs(workspace: Workspace, path: str | Path) -> tuple[Path, list[str]]:
    """Unpacks the pairs of a zip to a new folder of the workspace; returns the folder, and what was left out.

    A folder that contains everything else in the zip is skipped.

    Raises:
        VeneerError: not a zip, images beyond the limits, or fewer than two pairs; nothing is saved then.
    """
    workspace.check_queue()
    folder = workspace.new_dataset()
    try:
        _, left_out = unpack_zip(path, folder)
        _skip_single_folder(folder)
        found = find_pairs(folder, limits=photo_limits())
        if len(found.pairs) < 2:
            message = f"{len(found.pairs)} pair; expected two or more, since training and validation need one each."
            raise OptionError(message, option="pairs", where="zip", given=len(found.pairs), expected=2)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, VeneerError):
            raise type(error).from_error(error, _plain(str(error), folder)) from error
        raise
    return folder, [*left_out, *(printable(_plain(note, folder), 300) for note in found.notes)]


def _skip_single_folder(folder: Path) -> None:
    """Moves the content of the only folder up, unless it holds images itself."""
    entries = [*folder.iterdir()]
    if len(entries) == 1 and entries[0].is_dir() and all(each.is_dir() for each in entries[0].iterdir()):
        inner = entries[0].rename(folder / ".inner")
        for each in inner.iterdir():
            each.rename(folder / each.name)
        inner.rmdir()


def _plain(text: str, folder: Path) -> str:
    """A message without the folder of the server."""
    return text.replace(f"{folder}/", "").replace(str(folder), "the zip")
