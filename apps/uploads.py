"""What visitors bring, looked at before anything else is done with it: pictures and adapters. Zips: see `zips`."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from veneer.formats import format_of, read
from veneer.injection import LoadError, VeneerError
from veneer.training.data.image_io import PhotoError, PhotoLimits, Picture, decode, read_bytes

from .limits import LIMITS, MIB, Limits
from .workspace import safe, shown

PLENTY = 1024
"""Shortest side of a kept picture, in pixels: no base draws larger ones, and what is larger is made smaller."""


def photo_limits(limits: Limits = LIMITS) -> PhotoLimits:
    """How pictures of visitors are read."""
    return PhotoLimits(max_bytes=limits.photo_bytes, max_pixels=limits.photo_pixels)


def picture(path: str | Path, limits: Limits = LIMITS) -> Picture:
    """A visitor's picture, upright and RGB, its transparent parts on white; the first frame of an animation.

    Raises:
        PhotoError: no picture within the limits. The message has the file's name without its folder.
    """
    path = Path(path)
    name = shown(path.name)
    if path.is_file() and path.stat().st_size > limits.photo_bytes:
        size = path.stat().st_size
        raise PhotoError(
            f"{name}: {size / MIB:.1f} MiB; expected at most {limits.photo_bytes / MIB:g} MiB. Save it with fewer "
            "pixels, or as a JPEG, and upload it again.",
            file=name,
            where="photo_bytes",
            given=size,
            expected=limits.photo_bytes,
        )
    try:
        data = read_bytes(path, photo_limits(limits))
    except PhotoError as error:
        raise PhotoError.from_error(error, str(error).replace(str(path), name), file=name) from error
    return decode(data, name, photo_limits(limits), remarks=False)


def take_photos(paths: Sequence[str | Path], folder: Path, limits: Limits = LIMITS) -> tuple[list[Path], list[str]]:
    """Copy pictures into a job's folder under plain names, and say what was left out, and why.

    Each is decoded once within the limits, and written anew as a PNG: nothing else that the file holds comes along, such as
    the place where it was taken. What is much larger than is drawn is made smaller: its shorter side `PLENTY` pixels.

    Raises:
        VeneerError: more pictures than are allowed, or none that can be used.
    """
    if len(paths) > limits.photos:
        message = f"{len(paths)} pictures; expected at most {limits.photos}. Choose the best of them."
        raise VeneerError(message, where="photos", given=len(paths), expected=limits.photos)
    taken, refused = [], []
    for number, path in enumerate(map(Path, paths), 1):
        try:
            rgb = picture(path, limits).rgb
        except PhotoError as error:
            refused.append(str(error))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{number:03d}-{safe(path.stem, 'photo')}.png"
        _no_larger(rgb).save(target)
        taken.append(target)
    if not taken:
        message = "no picture that can be used. " + " ".join(refused or ["Add some first."])
        raise VeneerError(message, where="photos", given=0)
    return taken, refused


def _no_larger(image: Image.Image) -> Image.Image:
    """The picture in sRGB, without remarks, its shorter side at most `PLENTY`."""
    image.info.clear()
    short = min(image.size)
    if short <= PLENTY:
        return image
    width, height = (max(1, round(side * PLENTY / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def take_adapter(path: str | Path, folder: Path, name: str, limits: Limits = LIMITS) -> Path:
    """Copy an adapter's file into the workspace, if it is a safetensors file of a known format.

    A file of the same name that is there already stays: the new one gets a number.

    Raises:
        VeneerError: too large, no safetensors file, of no format that is known, or one more than a user may keep.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise VeneerError(
            f"{shown(name)}: {size:,} bytes; expected at most {limits.file_bytes:,}. Load it from a folder instead.",
            file=shown(name),
            where="file_bytes",
            given=size,
            expected=limits.file_bytes,
        )
    _check_adapter(path, name)
    folder.mkdir(parents=True, exist_ok=True)
    stem = safe(name, "adapter").removesuffix(".safetensors") or "adapter"
    kept = {file.name.casefold(): file for file in folder.glob("*.safetensors")}
    for number in range(1, limits.adapter_files + 2):
        target = folder / (f"{stem}.safetensors" if number == 1 else f"{stem}-{number}.safetensors")
        same = kept.get(target.name.casefold())
        if same is None:
            break
        if filecmp.cmp(path, same, shallow=False):
            return same
    if len(kept) >= limits.adapter_files:
        message = f"you keep {len(kept)} adapters; expected at most {limits.adapter_files}. Delete one first."
        raise VeneerError(message, where="adapters", given=len(kept), expected=limits.adapter_files)
    shutil.copyfile(path, target)
    return target


def _check_adapter(path: Path, name: str) -> None:
    try:
        file = read(path)
    except LoadError as error:
        raise LoadError.from_error(error, str(error).replace(str(path), shown(name)), file=shown(name)) from error
    if file.held is not None:
        message = f"{shown(name)}: an image with a token embedding in it; expected a .safetensors file."
        raise VeneerError(message, file=shown(name), given="image", expected=".safetensors")
    if format_of(file) is None:
        raise VeneerError(
            f"{shown(name)}: a safetensors file, but its {len(file.shapes)} tensors are of no adapter that is known here. "
            "If it is a whole model, put its folder in the place of the base.",
            file=shown(name),
            where="format",
            given=tuple(file.shapes),
        )
