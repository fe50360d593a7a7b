"""Uploaded training photos: inspection, and saving with captions for a job."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from veneer import base_models
from veneer.training.data.buckets import BucketPlan
from veneer.training.data.caption_files import read_captions
from veneer.training.data.image_io import DataWarning
from veneer.training.data.photo_checks.findings import check_photos
from veneer.training.data.photo_folder import find_photos

from ...uploads import photo_limits, store_photos
from ...workspace import Workspace, check_text

THUMBNAIL_SIDE = 256
"""Side of a thumbnail."""
Rows = Sequence[Sequence[str]]
"""Rows of photo name and caption."""


@dataclass(frozen=True)
class PhotoReport:
    """Inspection of uploaded photos: final file names, thumbnails, square crops, and problems in sentences."""

    names: list[str]
    thumbnails: list[Image.Image]
    crops: list[Image.Image]
    problems: list[str]


def inspect_photos(paths: Sequence[str], resolution: int) -> PhotoReport:
    """Decodes photos within the limits and reports problems: unreadable, duplicate, too small, or a finding of `check_photos`.

    Args:
        resolution: training resolution in pixels.
    Raises:
        VeneerError: too many photos, or no usable one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        stored, rejected = store_photos(paths, folder)
        problems = [*rejected, *_concerns(folder, resolution)]
        images = [_open(path) for path in stored]
    thumbnails = [ImageOps.contain(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE)) for image in images]
    crops = [ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS) for image in images]
    return PhotoReport([path.name for path in stored], thumbnails, crops, problems)


def _concerns(folder: Path, resolution: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        photos = find_photos(folder, limits=photo_limits(), resolution=resolution)
    problems = [str(each.message).replace(f"{folder}/", "").replace(str(folder), "the photos") for each in caught]
    plan = BucketPlan(resolution, math.gcd(resolution, 8))
    return problems + [str(each) for each in check_photos([(plan.choose(p.size), p) for p in photos], photo_limits())]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def save_photos(workspace: Workspace, paths: Sequence[str], captions: Rows) -> Path:
    """Saves photos to a new folder of the workspace, each with its caption in a `.txt` file; returns the folder.

    Args:
        captions: rows of a name, as in `PhotoReport.names`, and a caption; rows of other names are ignored.
    Raises:
        VeneerError: no usable photos, too many photos, a caption that is too long, or too many queued jobs.
    """
    workspace.check_queue()
    words = {str(row[0]): check_text(str(row[1] or ""), f"caption of {row[0]}") for row in captions if len(row) > 1}
    folder = workspace.new_dataset()
    try:
        stored, _ = store_photos(paths, folder)
        for path in stored:
            if caption := " ".join(words.get(path.name, "").split()):
                path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def example_photos() -> tuple[list[str], list[str]]:
    """Copies of the bundled example photos that Gradio may serve, and their captions."""
    source = base_models.examples()
    paths = sorted(source.glob("*.png"))
    captions = read_captions(source, paths)
    folder = Path(tempfile.mkdtemp(prefix="veneer-"))
    return [shutil.copyfile(path, folder / path.name).as_posix() for path in paths], [captions.get(path, "") for path in paths]
