"""Captions from files: a text file beside an image, or `metadata.jsonl` or `metadata.csv` of a folder.

A caption file belongs to the image with the same stem. Metadata have `file_name`, relative to their folder, and `text` (or
`caption`): one object a line in JSON Lines, as in the folders of Hugging Face Datasets, or columns of these names in CSV.
"""

import csv
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .image_io import DataError, DataWarning

METADATA = ("metadata.jsonl", "metadata.csv")
EXAMPLE = '{"file_name": "01.jpg", "text": "a photo of <toy>"}'


def read_captions(folder: Path, photos: Sequence[Path], extension: str = ".txt") -> dict[Path, str]:
    """Captions of the `photos` below `folder`; a text file beside an image overrides metadata.

    Metadata are read in `folder` and in the folders of the photos. Lines of a text file are joined by spaces.

    Args:
        extension: ending of the text files.

    Warns:
        DataWarning: an empty caption (treated as none), or two different captions of one photo.

    Raises:
        DataError: an invalid line, a caption of a missing file, two lines for one file, two metadata files in one folder, or text
            that is not UTF-8.
    """
    folders = dict.fromkeys([folder, *(photo.parent for photo in photos)])
    table = {each / name: (text, file) for each in folders for name, text, file in _metadata(each)}
    captions = {}
    for photo in photos:
        beside = photo.with_suffix(extension)
        text, source = table.get(photo, (None, ""))
        if beside.is_file():
            own = " ".join(read_utf8(beside).split())
            if text is not None and text != own:
                message = f"{photo}: captions in {beside.name} and {source} differ; {beside.name} is used"
                warnings.warn(DataWarning(message, file=photo, given=(own, text)), stacklevel=2)
            text = own
        if text:
            captions[photo] = text
        elif text is not None:
            message = f"{photo}: its caption is empty; a template is used instead"
            warnings.warn(DataWarning(message, file=photo, given=""), stacklevel=2)
    return captions


def _metadata(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Path of an image in `folder`, its caption, and the name of the metadata file."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        message = f"{folder}: both {' and '.join(METADATA)}; expected one of the two. Remove the other."
        raise DataError(message, file=folder, where="metadata", given=METADATA, expected=1)
    seen: dict[str, str] = {}
    for path in files:
        for where, entry, shown in _rows(path) if path.suffix == ".csv" else _lines(path):
            name, text = _entry(entry, path, where, shown)
            if name in seen:
                message = f"{path}, {where}: {name!r} has a caption on {seen[name]} already; expected one line per image."
                raise DataError(message, file=path, where=where, given=(name, seen[name]))
            if ".." in Path(name).parts or Path(name).is_absolute() or not (folder / name).is_file():
                message = f"{path}, {where}: file_name is {name!r}, which is not in {folder}. Correct it, or remove the line."
                raise DataError(message, file=path, where=where, given=name)
            seen[name] = where
            yield name, text, path.name


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Number, object and text of each line of a JSON Lines file."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            message = f"{path}, {where}: not JSON ({error}); expected one object a line, such as {EXAMPLE}."
            raise DataError(message, file=path, where=where, expected="JSON") from error
        yield where, entry if isinstance(entry, dict) else {}, line.strip()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Number, columns and text of each row of a CSV file with a header."""
    reader = csv.DictReader(read_utf8(path).splitlines())
    try:
        for entry in reader:
            yield f"line {reader.line_num}", entry, ", ".join(f"{name}={value}" for name, value in entry.items())
    except csv.Error as error:
        where = f"line {reader.line_num}"
        message = f"{path}, {where}: not CSV ({error}); expected the columns file_name and text."
        raise DataError(message, file=path, where=where, expected="CSV") from error


def _entry(entry: dict[str, Any], path: Path, where: str, shown: str) -> tuple[str, str]:
    name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
    if not isinstance(name, str) or not isinstance(text, str) or not name:
        message = f"{path}, {where}: found {shown[:80]}; expected file_name and text, such as {EXAMPLE}."
        raise DataError(message, file=path, where=where, given=entry, expected=("file_name", "text"))
    return name.removeprefix("./"), " ".join(text.split())


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: not UTF-8, with the position of the first wrong byte, or not readable.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8."
        raise DataError(message, file=path, where=f"byte {error.start}", expected="UTF-8") from error
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}). Check the path and permissions."
        raise DataError(message, file=path, given="unreadable") from error
