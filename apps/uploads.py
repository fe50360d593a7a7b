"""Validation and storage of uploaded images and adapters. For zips, see `zip_archives`."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from veneer.formats import format_of, read
from veneer.injection import LoadError, VeneerError
from veneer.training.data.image_io import DecodedImage, PhotoError, PhotoLimits, decode, read_bytes

from .limits import LIMITS, MIB, Limits
from .workspace import printable, safe_name

MAX_SHORT_SIDE = 1024
"""Maximum length in pixels of the shorter side of a stored image; larger images are downscaled."""


def photo_limits(limits: Limits = LIMITS) -> PhotoLimits:
    """Limits for decoding uploaded images."""
    return PhotoLimits(max_bytes=limits.photo_bytes, max_pixels=limits.photo_pixels)


def load_image(path: str | Path, limits: Limits = LIMITS) -> DecodedImage:
    """Decodes an uploaded image: upright, RGB, transparency on white, the first frame of an animation.

    Raises:
        PhotoError: not an image within the limits. The message has the file name without its folder.
    """
    path = Path(path)
    name = printable(path.name)
    if path.is_file() and path.stat().st_size > limits.photo_bytes:
        size = path.stat().st_size
        raise PhotoError(
            f"{name}: {size / MIB:.1f} MiB; expected at most {limits.photo_bytes / MIB:g} MiB. Save it with fewer "
            "pixels or as a JPEG, and upload it again.",
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


def store_photos(paths: Sequence[str | Path], folder: Path, limits: Limits = LIMITS) -> tuple[list[Path], list[str]]:
    """Copies images into a job's folder under safe names; returns their paths, and why others were rejected.

    Each image is decoded within the limits and saved as a PNG without its metadata, such as the GPS position. Images whose
    shorter side exceeds `MAX_SHORT_SIDE` are downscaled.

    Raises:
        VeneerError: too many images, or no usable one.
    """
    if len(paths) > limits.photos:
        message = f"{len(paths)} images; expected at most {limits.photos}. Choose fewer."
        raise VeneerError(message, where="photos", given=len(paths), expected=limits.photos)
    stored, rejected = [], []
    for number, path in enumerate(map(Path, paths), 1):
        try:
            rgb = load_image(path, limits).rgb
        except PhotoError as error:
            rejected.append(str(error))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{number:03d}-{safe_name(path.stem, 'photo')}.png"
        _downscale(rgb).save(target)
        stored.append(target)
    if not stored:
        message = "no usable image. " + " ".join(rejected or ["Add some first."])
        raise VeneerError(message, where="photos", given=0)
    return stored, rejected


def _downscale(image: Image.Image) -> Image.Image:
    """Removes metadata, and downscales the image so that its shorter side is at most `MAX_SHORT_SIDE`."""
    image.info.clear()
    short = min(image.size)
    if short <= MAX_SHORT_SIDE:
        return image
    width, height = (max(1, round(side * MAX_SHORT_SIDE / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def store_adapter(path: str | Path, folder: Path, name: str, limits: Limits = LIMITS) -> Path:
    """Copies an adapter file into the workspace if it is a safetensors file of a known format.

    If the name is taken by a different file, the new file gets a numbered name.

    Raises:
        VeneerError: the file is too large, not safetensors or of an unknown format, or the user has too many adapters.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise VeneerError(
            f"{printable(name)}: {size:,} bytes; expected at most {limits.file_bytes:,}. Use the command line instead.",
            file=printable(name),
            where="file_bytes",
            given=size,
            expected=limits.file_bytes,
        )
    _check_adapter(path, name)
    folder.mkdir(parents=True, exist_ok=True)
    stem = safe_name(name, "adapter").removesuffix(".safetensors") or "adapter"
    existing = {file.name.casefold(): file for file in folder.glob("*.safetensors")}
    for number in range(1, limits.adapter_files + 2):
        target = folder / (f"{stem}.safetensors" if number == 1 else f"{stem}-{number}.safetensors")
        same = existing.get(target.name.casefold())
        if same is None:
            break
        if filecmp.cmp(path, same, shallow=False):
            return same
    if len(existing) >= limits.adapter_files:
        message = f"you have {len(existing)} adapters; expected at most {limits.adapter_files}. Delete one first."
        raise VeneerError(message, where="adapters", given=len(existing), expected=limits.adapter_files)
    shutil.copyfile(path, target)
    return target


def _check_adapter(path: Path, name: str) -> None:
    try:
        file = read(path)
    except LoadError as error:
        raise LoadError.from_error(error, str(error).replace(str(path), printable(name)), file=printable(name)) from error
    if file.held is not None:
        message = f"{printable(name)}: an image with a token embedding in it; expected a .safetensors file."
        raise VeneerError(message, file=printable(name), given="image", expected=".safetensors")
    if format_of(file) is None:
        raise VeneerError(
            f"{printable(name)}: a safetensors file of {len(file.shapes)} tensors in no known adapter format. "
            "If it is a whole model, enter its folder as the base model.",
            file=printable(name),
            where="format",
            given=tuple(file.shapes),
        )
