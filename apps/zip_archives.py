"""Zips of labelled pictures, unpacked so that no name and no size that a zip claims is believed."""

from __future__ import annotations

import io
import os
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from veneer.injection import VeneerError
from veneer.training.data.image_io import PhotoError, PhotoLimits, examine

from .limits import LIMITS, Limits
from .workspace import safe, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TOLD = 20
"""Entries that were left out which are named."""
AN_ENTRY = 400
"""Bytes of a zip's table of contents for each picture that is allowed: 46, and its name and dates."""
PIECE = 2**20
WRONG = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, zlib.error)


class _Bounded(io.BufferedReader):
    """A file of which nobody reads more at once than `most` bytes: a table of contents is read at once."""

    most = 2 * PIECE

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.most:
            raise VeneerError(
                f"the zip has too many entries: {size:,} bytes of names, at most {self.most:,} are read. Leave some out.",
                where="entries",
                given=size,
                expected=self.most,
            )
        return super().read(max(size, 0))


def take_zip(path: str | Path, folder: Path, limits: Limits = LIMITS) -> tuple[int, list[str]]:
    """Unpack a zip of labelled pictures, `CLASS/NAME.png` or `SPLIT/CLASS/NAME.png`; gives their number and what was left out.

    Names are made plain part by part, and folders of different names stay different. Of each picture the head is looked at, not
    the points. If anything is wrong with the whole, nothing stays in `folder`.

    Raises:
        VeneerError: no zip, too many files, names that lead elsewhere, or too many bytes when they are unpacked.
    """
    existed = folder.exists()
    try:
        with io.FileIO(path) as raw, _Bounded(raw) as file:
            file.most = max(AN_ENTRY * limits.zip_files, _Bounded.most)
            with zipfile.ZipFile(file) as archive:
                return _unpacked(archive, folder, limits)
    except BaseException as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, WRONG) and not isinstance(error, VeneerError):
            raise VeneerError(
                f"the zip cannot be read: {shown(str(error))}. Expected a plain zip of folders of pictures.",
                where="zip",
                given="unreadable",
            ) from error
        raise


def _unpacked(archive: zipfile.ZipFile, folder: Path, limits: Limits) -> tuple[int, list[str]]:
    entries = [(entry, _parts(entry)) for entry in archive.infolist() if not entry.is_dir()]
    entries = [(entry, parts) for entry, parts in entries if not _hidden(parts)]
    pictures = [(entry, parts) for entry, parts in entries if parts[-1].lower().endswith(SUFFIXES)]
    if len(pictures) > limits.zip_files:
        message = f"the zip has {len(pictures):,} pictures; expected at most {limits.zip_files:,}."
        raise VeneerError(message, where="zip_files", given=len(pictures), expected=limits.zip_files)
    if sum(entry.file_size for entry, _ in pictures) > limits.zip_bytes:
        raise _too_large(limits)
    refused = [f"{shown(parts[-1])}: no picture" for _, parts in entries if not parts[-1].lower().endswith(SUFFIXES)]
    names, left, count = _Names(folder), limits.zip_bytes, 0
    for entry, parts in pictures:
        try:
            data = _content(archive, entry, len(parts), min(left, limits.photo_bytes))
            examine(data, shown(parts[-1]), PhotoLimits(limits.photo_bytes, limits.photo_pixels, min_side=2, max_aspect=100))
        except _Full:
            if left <= limits.photo_bytes:
                raise _too_large(limits) from None
            left -= limits.photo_bytes
            refused.append(f"{shown(parts[-1])}: more than {limits.photo_bytes:,} bytes")
            continue
        except PhotoError as error:
            refused.append(str(error))
            continue
        left -= len(data)
        target = names.place(parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        count += 1
    if not count:
        message = "the zip has no pictures that can be used; expected CLASS/NAME.png. " + " ".join(_some(refused))
        raise VeneerError(message, where="zip_files", given=0)
    return count, _some(refused)


class _Full(Exception):
    """More bytes came out than are allowed."""


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, depth: int, most: int) -> bytes:
    """What an entry holds, at most so many bytes.

    Raises:
        _Full: there are more. PhotoError: it is no plain file.
    """
    name = shown(entry.filename)
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise PhotoError(f"{name}: a link; expected the picture itself.", file=name, given="link")
    if depth > LIMITS.zip_depth:
        message = f"{name}: in {depth - 1} folders; expected at most {LIMITS.zip_depth - 1}."
        raise PhotoError(message, file=name, where="zip_depth", given=depth, expected=LIMITS.zip_depth)
    if entry.flag_bits & 1:
        message = "the zip is encrypted; expected one without a password. Make it anew."
        raise VeneerError(message, where="zip", given="encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        message = f"the zip is packed by way {entry.compress_type}; expected stored or deflated. Make it anew."
        raise VeneerError(message, where="compression", given=entry.compress_type)
    found = bytearray()
    with archive.open(entry) as stream:
        while data := stream.read(min(PIECE, most + 1 - len(found))):
            found += data
            if len(found) > most:
                raise _Full
    return bytes(found)


def _parts(entry: zipfile.ZipInfo) -> list[str]:
    """The folders and the name of an entry.

    Raises:
        VeneerError: they lead out of the zip's own folder.
    """
    name = unicodedata.normalize("NFC", entry.filename.replace("\\", "/"))
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        raise VeneerError(
            f"the zip has a name that leads out of its folder, {shown(name)!r}; nothing was unpacked. Make it anew.",
            where="name",
            given=shown(name),
        )
    return parts


def _hidden(parts: list[str]) -> bool:
    """What systems put into zips beside what was asked for."""
    return any(part.startswith((".", "__MACOSX")) for part in parts)


class _Names:
    """Plain names for those of a zip: the same for the same, and different ones for different ones, on every file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._folders: dict[str, str] = {}
        self._free: defaultdict[Path, _Free] = defaultdict(_Free)

    def place(self, parts: list[str]) -> Path:
        """Where the file of these names goes. A folder's name is the same below any other, so that splits share their classes."""
        inside = self.folder
        for part in parts[:-1]:
            if part not in self._folders:
                self._folders[part] = self._free[Path()].name(safe(part, "x"))
            inside = inside / self._folders[part]
        return inside / self._free[inside].name(safe(parts[-1], "x"))


class _Free:
    """Names of one folder that are not taken."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._tried: Counter[str] = Counter()

    def name(self, wanted: str) -> str:
        """This one, or with the first number that makes it another."""
        stem, dot, ending = wanted.rpartition(".")
        found = wanted
        while found.casefold() in self._taken:
            self._tried[wanted.casefold()] += 1
            number = self._tried[wanted.casefold()] + 1
            found = f"{stem}-{number}.{ending}" if dot else f"{wanted}-{number}"
        self._taken.add(found.casefold())
        return found


def _some(told: list[str]) -> list[str]:
    more = len(told) - TOLD
    return told if more <= 0 else [*told[:TOLD], f"and {more:,} more"]


def _too_large(limits: Limits) -> VeneerError:
    message = f"the zip has more than {limits.zip_bytes:,} bytes of pictures. Leave some out."
    return VeneerError(message, where="zip_bytes", expected=limits.zip_bytes)
