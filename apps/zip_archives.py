"""Safe extraction of zips of labeled images: names and sizes stated in the zip are not trusted."""

from __future__ import annotations

import io
import os
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from veneer.injection import VeneerError
from veneer.training.data.image_io import PhotoError, PhotoLimits, examine

from .limits import LIMITS, Limits
from .workspace import printable, safe_name

TABLES = (".csv", ".tsv", ".jsonl")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_LISTED = 20
"""Maximum number of rejected entries that are listed."""
ENTRY_BYTES = 400
"""Bytes of the central directory allowed per image: 46, plus its name and extra fields."""
CHUNK_BYTES = 2**20
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, zlib.error)


class _BoundedReader(io.BufferedReader):
    """Reader that rejects single reads above `limit` bytes, since `zipfile` reads the central directory in one call."""

    limit = 2 * CHUNK_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.limit:
            raise VeneerError(
                f"the zip has too many entries: {size:,} bytes of names; expected at most {self.limit:,}. Remove some files.",
                where="entries",
                given=size,
                expected=self.limit,
            )
        return super().read(max(size, 0))


@dataclass(frozen=True)
class UnpackedZip:
    """Content of a zip.

    Args:
        images: path in the zip to the file of each image. `tables`: path in the zip to the content of each table.
        unusable: paths in the zip of the images that were rejected. `reasons`: why files were rejected.
    """

    images: dict[str, Path] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)


def unpack_zip(path: str | Path, folder: Path, limits: Limits = LIMITS) -> tuple[int, list[str]]:
    """Number of images that `read_zip` unpacks, and why others were rejected."""
    content = read_zip(path, folder, limits)
    return len(content.images), shorten(content.reasons)


def read_zip(path: str | Path, folder: Path, limits: Limits = LIMITS, tables: bool = False) -> UnpackedZip:
    """Unpacks a zip of labeled images, `CLASS/NAME.png` or `SPLIT/CLASS/NAME.png`, and with `tables` reads its tables.

    Each part of a path is converted to a safe name, and distinct folders stay distinct. Image headers are checked, pixels are
    not decoded. If the zip as a whole is invalid, `folder` is removed.

    Raises:
        VeneerError: not a zip, too many files, names that leave the folder, or too large when unpacked.
    """
    existed = folder.exists()
    try:
        with io.FileIO(path) as raw, _BoundedReader(raw) as file:
            file.limit = max(ENTRY_BYTES * limits.zip_files, _BoundedReader.limit)
            with zipfile.ZipFile(file) as archive:
                return _unpack(archive, folder, limits, tables)
    except BaseException as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ZIP_ERRORS) and not isinstance(error, VeneerError):
            raise VeneerError(
                f"the zip cannot be read: {printable(str(error))}. Expected a zip with a folder of images for each class.",
                where="zip",
                given="unreadable",
            ) from error
        raise


def _unpack(archive: zipfile.ZipFile, folder: Path, limits: Limits, tables: bool) -> UnpackedZip:
    entries = [(entry, _parts(entry)) for entry in archive.infolist() if not entry.is_dir()]
    entries = [(entry, parts) for entry, parts in entries if not _hidden(parts)]
    images = [(entry, parts) for entry, parts in entries if parts[-1].lower().endswith(SUFFIXES)]
    if len(images) > limits.zip_files:
        message = f"the zip has {len(images):,} images; expected at most {limits.zip_files:,}."
        raise VeneerError(message, where="zip_files", given=len(images), expected=limits.zip_files)
    if sum(entry.file_size for entry, _ in images) > limits.zip_bytes:
        raise _too_large(limits)
    content = UnpackedZip()
    for entry, parts in entries:
        if tables and parts[-1].lower().endswith(TABLES):
            content.tables["/".join(parts)] = _table(archive, entry, parts, limits)
        elif not parts[-1].lower().endswith(SUFFIXES):
            content.reasons.append(f"{printable(parts[-1])}: not an image")
    _unpack_images(archive, images, folder, limits, content)
    if not content.images:
        message = "the zip has no usable images; expected CLASS/NAME.png. " + " ".join(shorten(content.reasons))
        raise VeneerError(message, where="zip_files", given=0)
    return content


def _unpack_images(
    archive: zipfile.ZipFile,
    entries: Sequence[tuple[zipfile.ZipInfo, list[str]]],
    folder: Path,
    limits: Limits,
    content: UnpackedZip,
) -> None:
    names, left = _NameMap(folder), limits.zip_bytes
    for entry, parts in entries:
        try:
            data = _content(archive, entry, len(parts), min(left, limits.photo_bytes))
            examine(data, printable(parts[-1]), PhotoLimits(limits.photo_bytes, limits.photo_pixels, min_side=2, max_aspect=100))
        except PhotoError as error:
            reason = str(error)
        except _TooLarge:
            if left <= limits.photo_bytes:
                raise _too_large(limits) from None
            left -= limits.photo_bytes
            reason = f"{printable(parts[-1])}: more than {limits.photo_bytes:,} bytes"
        else:
            left -= len(data)
            target = names.path_for(parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            content.images["/".join(parts)] = target
            continue
        content.unusable.add("/".join(parts))
        content.reasons.append(reason)


def _table(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, parts: list[str], limits: Limits) -> bytes:
    """Reads a table.

    Raises:
        VeneerError: it is too large, or no regular file.
    """
    name = printable(parts[-1])
    try:
        return _content(archive, entry, len(parts), limits.table_bytes)
    except PhotoError as error:
        raise VeneerError.from_error(error, str(error), file=name) from error
    except _TooLarge:
        message = f"{name}: more than {limits.table_bytes:,} bytes. Split the images into several zips."
        raise VeneerError(message, where="table_bytes", file=name, expected=limits.table_bytes) from None


class _TooLarge(Exception):
    """An entry unpacks to more bytes than allowed."""


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, depth: int, limit: int) -> bytes:
    """Reads the content of an entry.

    Raises:
        _TooLarge: it has more than `limit` bytes. PhotoError: it is not a regular file, or its path is too deep.
    """
    name = printable(entry.filename)
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise PhotoError(f"{name}: a symbolic link; expected the image file itself.", file=name, given="link")
    if depth > LIMITS.zip_depth:
        message = f"{name}: nested in {depth - 1} folders; expected at most {LIMITS.zip_depth - 1}."
        raise PhotoError(message, file=name, where="zip_depth", given=depth, expected=LIMITS.zip_depth)
    if entry.flag_bits & 1:
        message = "the zip is encrypted; expected one without a password. Create it again."
        raise VeneerError(message, where="zip", given="encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        message = f"the zip uses compression method {entry.compress_type}; expected stored or deflated. Create it again."
        raise VeneerError(message, where="compression", given=entry.compress_type)
    content = bytearray()
    with archive.open(entry) as stream:
        while data := stream.read(min(CHUNK_BYTES, limit + 1 - len(content))):
            content += data
            if len(content) > limit:
                raise _TooLarge
    return bytes(content)


def _parts(entry: zipfile.ZipInfo) -> list[str]:
    """Parts of the path of an entry.

    Raises:
        VeneerError: the path leaves the folder.
    """
    name = unicodedata.normalize("NFC", entry.filename.replace("\\", "/"))
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        raise VeneerError(
            f"the zip has a path outside of its folder, {printable(name)!r}; nothing was unpacked. Create it again.",
            where="name",
            given=printable(name),
        )
    return parts


def _hidden(parts: list[str]) -> bool:
    """Whether a path is one of the hidden files that operating systems add to zips."""
    return any(part.startswith((".", "__MACOSX")) for part in parts)


class _NameMap:
    """Maps paths of a zip to safe paths, one to one on every file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._folders: dict[str, str] = {}
        self._names: defaultdict[Path, _UniqueNames] = defaultdict(_UniqueNames)

    def path_for(self, parts: list[str]) -> Path:
        """Safe path of a file. A folder name maps to the same name at any depth, so that splits share their classes."""
        inside = self.folder
        for part in parts[:-1]:
            if part not in self._folders:
                self._folders[part] = self._names[Path()].name(safe_name(part, "x"))
            inside = inside / self._folders[part]
        return inside / self._names[inside].name(safe_name(parts[-1], "x"))


class _UniqueNames:
    """Generates unique file names in one folder, ignoring case."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._attempts: Counter[str] = Counter()

    def name(self, name: str) -> str:
        """Returns the name, numbered if it is already used."""
        stem, dot, ending = name.rpartition(".")
        unique = name
        while unique.casefold() in self._used:
            self._attempts[name.casefold()] += 1
            number = self._attempts[name.casefold()] + 1
            unique = f"{stem}-{number}.{ending}" if dot else f"{name}-{number}"
        self._used.add(unique.casefold())
        return unique


def shorten(reasons: list[str]) -> list[str]:
    """The first `MAX_LISTED` reasons, and the number of the others."""
    more = len(reasons) - MAX_LISTED
    return reasons if more <= 0 else [*reasons[:MAX_LISTED], f"and {more:,} more"]


def _too_large(limits: Limits) -> VeneerError:
    message = f"the zip has more than {limits.zip_bytes:,} bytes of images. Remove some."
    return VeneerError(message, where="zip_bytes", expected=limits.zip_bytes)
