"""What visitors bring, looked at before anything else is done with it: pictures, zips of pictures, and adapters."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from veneer.formats import format_of, read
from veneer.injection import VeneerError
from veneer.training.photos import PhotoError, PhotoLimits, decode, read_bytes

from .limits import LIMITS, Limits
from .workspace import safe, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def photo_limits(limits: Limits = LIMITS) -> PhotoLimits:
    """How pictures of visitors are read."""
    return PhotoLimits(max_bytes=limits.photo_bytes, max_pixels=limits.photo_pixels)


def take_photos(paths: Sequence[str | Path], folder: Path, limits: Limits = LIMITS) -> tuple[list[Path], list[str]]:
    """Copy pictures into a job's folder under plain names, and say what was left out, and why.

    Each is decoded once within the limits; what is copied are the bytes that were decoded.

    Raises:
        VeneerError: more pictures than are allowed, or none that can be used.
    """
    if len(paths) > limits.photos:
        raise VeneerError(f"{len(paths)} pictures; expected at most {limits.photos}. Choose the best of them.")
    taken, refused = [], []
    for number, path in enumerate(map(Path, paths), 1):
        try:
            data = read_bytes(path, photo_limits(limits))
            picture = decode(data, path, photo_limits(limits))
        except PhotoError as error:
            refused.append(str(error).replace(str(path.parent) + "/", ""))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{number:03d}-{safe(path.stem, 'photo')}.png"
        picture.rgb.save(target)
        taken.append(target)
    if not taken:
        raise VeneerError("no picture that can be used. " + " ".join(refused or ["Add some first."]))
    return taken, refused


def take_adapter(path: str | Path, folder: Path, name: str, limits: Limits = LIMITS) -> Path:
    """Copy an adapter's file into the workspace, if it is a safetensors file of a known format.

    Raises:
        VeneerError: too large, no safetensors file, or of no format that is known.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise VeneerError(
            f"{shown(name)}: {size:,} bytes; expected at most {limits.file_bytes:,}. Load it from a folder instead."
        )
    file = read(path)
    if format_of(file) is None:
        raise VeneerError(
            f"{shown(name)}: a safetensors file, but its {len(file.shapes)} tensors are of no adapter that is known here. "
            "If it is a whole model, put its folder in the place of the base."
        )
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / safe(name, "adapter.safetensors")
    target = target.with_suffix(".safetensors")
    shutil.copyfile(path, target)
    return target


def take_zip(path: str | Path, folder: Path, limits: Limits = LIMITS) -> tuple[int, list[str]]:
    """Unpack a zip of labelled pictures, `CLASS/NAME.png` or `SPLIT/CLASS/NAME.png`; gives their number and what was left out.

    Names are made plain part by part, so no entry lands outside of `folder`; sizes are those that come out, not those that are
    claimed.

    Raises:
        VeneerError: no zip, too many files, or too many bytes when they are unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpacked(archive, folder, limits)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise VeneerError(f"the zip cannot be read: {shown(str(error))}. Expected a plain zip of folders of pictures.") from error


def _unpacked(archive: zipfile.ZipFile, folder: Path, limits: Limits) -> tuple[int, list[str]]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir() and not _hidden(entry.filename)]
    pictures = [entry for entry in entries if entry.filename.lower().endswith(SUFFIXES)]
    if len(pictures) > limits.zip_files:
        raise VeneerError(f"the zip has {len(pictures):,} pictures; expected at most {limits.zip_files:,}.")
    if any(".." in PurePosixPath(entry.filename.replace("\\", "/")).parts for entry in entries):
        raise VeneerError("the zip has names with '..', which lead out of its folder; nothing was unpacked. Make it anew.")
    refused = [f"{shown(entry.filename)}: no picture" for entry in entries if entry not in pictures]
    left, count = limits.zip_bytes, 0
    for entry in pictures:
        parts = [safe(part, "x") for part in PurePosixPath(entry.filename.replace("\\", "/")).parts]
        data = b""
        with archive.open(entry) as stream:
            for part in _parts(stream, min(left, limits.photo_bytes) + 1):
                data += part
        if len(data) > left:
            raise VeneerError(f"the zip has more than {limits.zip_bytes:,} bytes of pictures. Leave some out.")
        left -= len(data)
        if len(data) > limits.photo_bytes:
            refused.append(f"{shown(entry.filename)}: more than {limits.photo_bytes:,} bytes")
            continue
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        count += 1
    if not count:
        raise VeneerError("the zip has no pictures; expected CLASS/NAME.png.")
    return count, refused


def _parts(stream: object, most: int) -> Iterator[bytes]:
    """What comes out, up to so many bytes."""
    while most > 0 and (data := stream.read(min(most, 2**20))):  # type: ignore[attr-defined]
        most -= len(data)
        yield data


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part not in ("..", ".") for part in PurePosixPath(name).parts)
