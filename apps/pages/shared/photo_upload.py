"""Photos that a visitor brings to teach from: looked at, and laid down with their captions where a job finds them."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from veneer import base_models
from veneer.training.data.captions import read_captions
from veneer.training.data.image_io import DataWarning
from veneer.training.data.photo_folder import find_photos

from ...uploads import photo_limits, take_photos
from ...workspace import Workspace, bounded

THUMB = 256
"""Side of a thumbnail."""
Rows = Sequence[Sequence[str]]
"""A photo's name and its caption."""


@dataclass(frozen=True)
class Looked:
    """What was found in photos: names as they will be called, thumbnails, square crops, and what is wrong, in sentences."""

    names: list[str]
    thumbs: list[Image.Image]
    crops: list[Image.Image]
    wrong: list[str]


def look_at(paths: Sequence[str], resolution: int) -> Looked:
    """Decode photos in a guarded way, and say what is wrong with them: unreadable, the same twice, too small.

    Args:
        resolution: side in pixels at which the base learns.
    Raises:
        VeneerError: too many, or none that can be used.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        taken, refused = take_photos(paths, folder)
        wrong = [*refused, *_concerns(folder, resolution)]
        pictures = [_opened(path) for path in taken]
    thumbs = [ImageOps.contain(picture, (THUMB, THUMB)) for picture in pictures]
    crops = [ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS) for picture in pictures]
    return Looked([path.name for path in taken], thumbs, crops, wrong)


def _concerns(folder: Path, resolution: int) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", DataWarning)
        find_photos(folder, limits=photo_limits(), resolution=resolution)
    return [str(each.message).replace(f"{folder}/", "").replace(str(folder), "the photos") for each in said]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def lay_down(workspace: Workspace, paths: Sequence[str], captions: Rows) -> Path:
    """Photos in a new folder of the workspace, each with its caption in a `.txt` beside it. Gives the folder.

    Args:
        captions: rows of a name, as in `Looked.names`, and words; others are passed over.
    Raises:
        VeneerError: no usable photos, too many, a caption that is too long, or too many jobs that wait.
    """
    workspace.check_room()
    words = {str(row[0]): bounded(str(row[1] or ""), f"caption of {row[0]}") for row in captions if len(row) > 1}
    folder = workspace.new_given()
    try:
        taken, _ = take_photos(paths, folder)
        for path in taken:
            if caption := " ".join(words.get(path.name, "").split()):
                path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def example() -> tuple[list[str], list[str]]:
    """The photos that the package carries, copied to where a page may show them, and their captions."""
    source = base_models.examples()
    paths = sorted(source.glob("*.png"))
    found = read_captions(source, paths)
    folder = Path(tempfile.mkdtemp(prefix="veneer-"))
    return [shutil.copyfile(path, folder / path.name).as_posix() for path in paths], [found.get(path, "") for path in paths]
