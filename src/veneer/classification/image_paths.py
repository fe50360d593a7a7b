"""Image files of a command line: files, folders, and lists of paths."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from veneer.injection import VeneerError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
STDIN = Path("-")
LIST_SUFFIX = ".txt"


def find_images(images: Sequence[Path]) -> list[Path]:
    """Image files, with folders expanded recursively and sorted by name.

    Args:
        images: image files, folders, `.txt` files with one path per line, and `-` for such a list from stdin. Paths in lists are
            relative to the working directory; empty lines are ignored.
    Raises:
        VeneerError: a path does not exist, a folder has no images, or a list has no paths.
    """
    return [file for image in images for file in _expand(image)]


def _expand(image: Path) -> Iterator[Path]:
    if image == STDIN:
        yield from _listed_images("stdin", sys.stdin.read())
    elif image.suffix.lower() == LIST_SUFFIX and image.is_file():
        yield from _listed_images(str(image), _read_text(image))
    else:
        yield from _file_or_folder(image)


def _file_or_folder(image: Path, where: str | None = None) -> list[Path]:
    source = f"{where}: " if where else ""
    if image.is_dir():
        inside = sorted(p for p in image.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not inside:
            message = f"{source}{image}: no image in this folder; expected files such as .jpg or .png."
            raise VeneerError(message, where=where, file=image, given=())
        return inside
    if not image.exists():
        raise VeneerError(f"{source}{image}: there is no such file or folder.", where=where, file=image, given="missing")
    return [image]


def _listed_images(name: str, text: str) -> Iterator[Path]:
    """Image files of a list. `name`: of the list, for errors."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        message = f"{name}: no paths; expected one image file or folder per line."
        raise VeneerError(message, where=name, given=())
    for number, line in lines:
        yield from _file_or_folder(Path(line).expanduser(), f"{name}, line {number}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{file}: not a text file in UTF-8; expected one image path per line."
        raise VeneerError(message, where=str(file), file=file, given="no UTF-8") from error
