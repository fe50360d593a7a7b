"""Tables of labels for images with several labels, in a folder or in an uploaded zip."""

from __future__ import annotations

import csv
import posixpath
import tempfile
import unicodedata
from pathlib import Path

from veneer.classification.data.csv_table import TableLine, read_lines
from veneer.injection import VeneerError
from veneer.training.data.image_io import DataError

from ...workspace import printable
from ...zip_archives import UnpackedZip

NAMES = ("labels.csv", "labels.tsv", "metadata.csv", "metadata.jsonl")
"""Names of a table that is read if there are several."""
ABOUT = "A table labels.csv has the columns path and labels; the labels of an image are separated by ; such as cat;outdoor."
MOST = 5
"""Missing images that an error lists."""


def table_or_folder(folder: Path) -> Path:
    """The `labels.csv` or `labels.tsv` of a folder, or the folder itself, whose metadata table the command finds."""
    return next((folder / name for name in NAMES[:2] if (folder / name).is_file()), folder)


def write_metadata(content: UnpackedZip, folder: Path) -> list[str]:
    """Writes the table of a zip to `metadata.csv` in the folder of its images, with their new paths.

    A path of the table starts at the table's folder in the zip, and must be one of the zip: a table cannot name other files of
    this machine.

    Returns:
        Notes on images that the table does not name.
    Raises:
        VeneerError: no table, several without one of `NAMES`, an invalid one, or images that are not in the zip.
    """
    name = _choose_table(content)
    rows, missing, named = list[tuple[str, str, str]](), list[str](), set[str]()
    for line in _lines(name, content.tables[name]):
        path = _path_in_zip(name, line.path)
        if path in content.unusable:
            continue
        if path not in content.images:
            missing.append(f"{line.where}: {printable(line.path)}")
            continue
        named.add(path)
        rows.append((content.images[path].relative_to(folder).as_posix(), line.label, line.split))
    if missing:
        more = f" and {len(missing) - MOST:,} more" if len(missing) > MOST else ""
        message = (
            f"{name}: images that are not in the zip: {'; '.join(missing[:MOST])}{more}. Correct the paths, or add the images."
        )
        raise VeneerError(message, file=name, where="path", given=tuple(missing))
    _write(folder / "metadata.csv", rows)
    unlabeled = len(content.images) - len(named)
    return [f"{unlabeled:,} images that {printable(name)} does not name"] if unlabeled else []


def _choose_table(content: UnpackedZip) -> str:
    """Path of the table in the zip."""
    by_depth = sorted(content.tables, key=lambda path: (path.count("/"), path))
    known = [path for name in NAMES for path in by_depth if posixpath.basename(path).lower() == name]
    if known or len(by_depth) == 1:
        return [*known, *by_depth][0]
    found = f"the zip has {len(by_depth):,} tables" if by_depth else "the zip has no table"
    message = f"{found}; expected one labels.csv with the columns path and labels, beside the images."
    raise VeneerError(message, file="the zip", where="table", given=tuple(by_depth), expected=NAMES)


def _lines(name: str, data: bytes) -> list[TableLine]:
    """Lines of a table.

    Raises:
        VeneerError: invalid text or columns.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"table{posixpath.splitext(name)[1].lower()}"
        file.write_bytes(data)
        try:
            return list(read_lines(file, multi_label=True))
        except DataError as error:
            raise VeneerError.from_error(error, str(error).replace(str(file), printable(name)), file=name) from error


def _path_in_zip(table: str, path: str) -> str:
    """Path of an image in the zip."""
    text = unicodedata.normalize("NFC", path.replace("\\", "/"))
    return posixpath.normpath(posixpath.join(posixpath.dirname(table), text))


def _write(file: Path, rows: list[tuple[str, str, str]]) -> None:
    with_split = any(split for *_, split in rows)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file_name", "labels", "split") if with_split else ("file_name", "labels"))
        writer.writerows(row if with_split else row[:2] for row in rows)
