"""WebDataset shards: tar files whose members with the same name before the first dot are one sample.

An image is used with the text in `NAME.txt`, or the `caption` or `text` in `NAME.json`. Other members are skipped.
Source: webdataset/webdataset, the tar format of its documentation.
"""

import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from veneer.atomic_files import write_atomically

from .image_io import DataError, DataWarning, PhotoLimits
from .photo_folder import READ

SHARD = ".tar"
MEMBERS = 10**6
"""Largest number of members of a shard."""
TEXT_BYTES = 2**20
"""Largest size of a caption."""


def shards_of(source: Path) -> list[Path]:
    """The shards of a dataset: the tar file itself, or those of a folder that has only tar files; else none."""
    if source.suffix.lower() == SHARD and source.is_file():
        return [source]
    files = sorted(path for path in source.iterdir() if not path.name.startswith(".")) if source.is_dir() else []
    return files if all(path.suffix.lower() == SHARD and path.is_file() for path in files) else []


def extract_shards(shards: list[Path], target: Path, limits: PhotoLimits = PhotoLimits()) -> Path:  # noqa: B008 (frozen)
    """Writes the images and captions of shards into a folder, under new names in the order of the shards.

    Names in the tar files are never used as paths, and links, devices and folders are skipped. Files that are there already are
    kept if they have the same size, so that a resumed run does not write them again.

    Args:
        target: the folder.
    Returns:
        `target`.
    Raises:
        DataError: a damaged tar file, an image or caption above the limits, two images of one sample, or no images.
    """
    count = 0
    for number, shard in enumerate(shards):
        for name, image, ending, caption in _samples(shard, limits):
            stem = f"{number:04d}-{count:07d}"
            _write(target / f"{stem}{ending}", image)
            if caption is not None:
                _write(target / f"{stem}.txt", caption.encode())
            count += bool(name)
    if not count:
        names = tuple(shard.name for shard in shards)
        message = f"{shards[0]}: no images in {', '.join(names[:4])}; expected members such as 000.jpg and 000.txt."
        raise DataError(message, file=shards[0], given=names, expected=tuple(sorted(READ)))
    return target


def _samples(shard: Path, limits: PhotoLimits) -> Iterator[tuple[str, bytes, str, str | None]]:
    """Name, image, ending and caption of each sample that has an image; its members follow one another."""
    name, image, ending, caption, skipped = "", b"", "", None, set[str]()
    for key, kind, data in _members(shard, limits, skipped):
        if key != name and image:
            yield name, image, ending, caption
        if key != name:
            name, image, ending, caption = key, b"", "", None
        if kind in READ and image:
            message = f"{shard}: two images of the sample {key!r}; expected one."
            raise DataError(message, file=shard, where=key, given=kind, expected=1)
        if kind in READ:
            image, ending = data, kind
        elif (text := _caption(data, kind, shard, key)) is not None:
            caption = text
    if image:
        yield name, image, ending, caption
    if skipped:
        message = f"{shard}: members skipped: {', '.join(sorted(skipped)[:8])}"
        warnings.warn(DataWarning(message, file=shard, given=tuple(sorted(skipped))), stacklevel=3)


def _members(shard: Path, limits: PhotoLimits, skipped: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Name up to the first dot, ending and content of images and captions. `skipped` receives the endings of others."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for number, member in enumerate(archive):
                if number >= MEMBERS:
                    raise DataError(
                        f"{shard}: more than {MEMBERS:,} members. Split it.", file=shard, given=number, expected=MEMBERS
                    )
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                kind = f".{ending.lower()}"
                if not member.isfile() or kind not in {*READ, ".txt", ".json"} or not stem:
                    skipped |= {kind} if member.isfile() else {member.name} if not member.isdir() else set()
                    continue
                limit = limits.max_bytes if kind in READ else TEXT_BYTES
                if member.size > limit:
                    message = f"{shard}: {member.name!r} has {member.size:,} bytes; expected at most {limit:,}."
                    raise DataError(message, file=shard, where=member.name, given=member.size, expected=limit)
                content: IO[bytes] | None = archive.extractfile(member)
                yield f"{folder}/{stem}", kind, content.read() if content else b""
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        message = f"{shard}: not a readable tar file ({error}); expected an uncompressed one."
        raise DataError(message, file=shard, given="damaged", expected="tar") from error
    except OSError as error:
        message = f"{shard}: cannot be read ({error.strerror}). Check permissions."
        raise DataError(message, file=shard, given="unreadable") from error


def _caption(data: bytes, kind: str, shard: Path, key: str) -> str | None:
    try:
        text = data.decode("utf-8-sig")
        if kind == ".json":
            record = json.loads(text)
            found = record.get("caption", record.get("text")) if isinstance(record, dict) else None
            return " ".join(found.split()) if isinstance(found, str) else None
    except (ValueError, RecursionError) as error:
        message = f"{shard}: the caption {kind} of {key!r} cannot be read ({error}); expected UTF-8 text or JSON."
        raise DataError(message, file=shard, where=key, given=kind, expected="UTF-8") from error
    return " ".join(text.split())


def _write(path: Path, data: bytes) -> None:
    if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
