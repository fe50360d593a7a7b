"""Labeled images from a table: a CSV of paths and labels, or the `metadata.csv` and `metadata.jsonl` of an image folder."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from veneer.training.data.caption_files import read_utf8
from veneer.training.data.image_io import DataError

from .image_folder import is_image, is_inside, reader, visible
from .labeled_images import SPLITS, LabeledRow, Source, Split, assemble, some
from .multi_label.label_cells import LabelCellError, parse_labels, separator_notes

_PATHS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image", "image_path", "img")
_LABELS = ("label", "class", "category", "target", "class_name", "labels")
_SPLITS = ("split", "subset", "set", "partition")
_COLUMNS = "path,label or path,label,split"


class TableLine(NamedTuple):
    """A line of a table: its number as text, the path, the label cell, and the split or ""."""

    where: str
    path: str
    label: str
    split: str

    def error(self, text: str, given: str, expected: object) -> DataError:
        return DataError(f"{self.where}: {text}", where=self.where, given=given, expected=expected)


class _TableRows(NamedTuple):
    rows: list[LabeledRow]
    paths: dict[str, Path]
    notes: list[str]


def read_csv(path: Path, multi_label: bool = False) -> Source:
    """Reads a CSV of path, label and optionally split, with a header or in this order.

    The separator (comma, semicolon, tab or bar) is the most frequent one in the first line; with `multi_label` only comma or tab,
    because semicolons and bars separate the labels of an image (see `parse_labels`). Relative paths start at the table's
    folder and must stay inside it; absolute paths are allowed. A split is a word such as train, val or test. Duplicate lines
    count once.

    Raises:
        DataError: invalid table; or, with line numbers: missing files, empty fields, unknown splits, one image with two labels or
            two splits.
    """
    contents = _read_table(path, _csv_lines(path, multi_label), path.parent, None, multi_label)
    return assemble(str(path), contents.rows, reader(contents.paths), contents.notes, multi_label)


def metadata_files(root: Path) -> dict[Path, Split | None]:
    """The `metadata.csv` or `metadata.jsonl` of a folder, or of its train, validation and test folders, that have labels."""
    folders: list[tuple[Path, Split | None]] = [(root, None)]
    folders += [(each, SPLITS[each.name.lower()]) for each in visible(root) if each.is_dir() and each.name.lower() in SPLITS]
    places = [(folder / name, split) for folder, split in folders for name in ("metadata.csv", "metadata.jsonl")]
    return {path: split for path, split in places if path.is_file() and _has_labels(path)}


def read_metadata(root: Path, tables: Mapping[Path, Split | None], multi_label: bool = False) -> Source:
    """Reads the metadata tables of an image folder of the `datasets` library. Raises the errors of `read_csv`."""
    rows: list[LabeledRow] = []
    paths: dict[str, Path] = {}
    notes: list[str] = []
    for table, split in tables.items():
        contents = _read_table(table, read_lines(table, multi_label), root, split, multi_label)
        rows += contents.rows
        paths.update(contents.paths)
        notes += contents.notes
    return assemble(str(root), rows, reader(paths), notes, multi_label)


def read_lines(table: Path, multi_label: bool = False) -> Iterator[TableLine]:
    """The lines of a table with their text, without reading images.

    Raises:
        DataError: no CSV with a path and a label column, or no JSON objects.
    """
    return _jsonl_lines(table) if table.suffix == ".jsonl" else _csv_lines(table, multi_label)


def _read_table(table: Path, lines: Iterator[TableLine], root: Path, split: Split | None, multi_label: bool) -> _TableRows:
    rows: dict[str, LabeledRow] = {}
    paths: dict[str, Path] = {}
    first: dict[str, str] = {}
    problems: list[DataError] = []
    duplicates = 0
    with_splits = None
    for line in lines:
        problem, path, name = _resolve_path(line, table.parent, root)
        word = SPLITS.get(line.split.lower()) if line.split else split
        labels: tuple[str, ...] = ("",)
        try:
            labels = parse_labels(line.label, multi_label)
        except LabelCellError as error:
            problem = problem or line.error(str(error), error.given, error.expected)
        if labels[0] and line.split and word is None:
            text = f"split {line.split!r}; expected one of {', '.join(SPLITS)}"
            problem = problem or line.error(text, line.split, tuple(SPLITS))
        elif with_splits is not None and with_splits != (word is not None):
            problem = problem or line.error(
                "some lines have a split and others do not; expected all or none", line.split, "split"
            )
        row = LabeledRow(name, labels[0], word, labels[1:])
        if not problem and rows.get(name, row) != row:
            text = f"{name} is also in {first[name]}, with label {rows[name].label!r} and split {rows[name].split}"
            problem = line.error(text, name, first[name])
        if problem:
            problems.append(problem)
            continue
        with_splits = word is not None
        duplicates += name in rows
        rows[name], paths[name] = row, path
        first.setdefault(name, line.where)
    if problems:
        more = f"\n  and {len(problems) - 8:,} more" if len(problems) > 8 else ""
        listing = "".join(f"\n  {each}" for each in problems[:8])
        message = f"{table}: {len(problems):,} invalid lines; correct or remove them:{listing}{more}"
        raise DataError(message, file=table, where="lines", given=tuple(problems))
    notes = [f"{table}: {duplicates:,} duplicate lines ignored."] if duplicates else []
    notes += [] if multi_label else separator_notes(table, (row.label for row in rows.values()))
    return _TableRows(list(rows.values()), paths, notes)


def _resolve_path(line: TableLine, folder: Path, root: Path) -> tuple[DataError | None, Path, str]:
    """Error of a line's path or None, the absolute path, and the image's name in the source."""
    if not line.path:
        return line.error("no path", "", "path"), folder, ""
    text = line.path.replace("\\", "/")
    path = Path(text)
    if not path.is_absolute():
        path = Path(os.path.normpath(folder / text))
        if not is_inside(path, folder):
            message = f"{line.path} is outside the table's folder; expected a path inside it, or an absolute path"
            return line.error(message, line.path, "folder"), path, text
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return (None if path.is_file() else line.error(f"no such file: {path}", line.path, "file")), path, name


def _csv_lines(path: Path, multi_label: bool) -> Iterator[TableLine]:
    text = read_utf8(path)
    separator = _separator(text, ",\t" if multi_label else ",;\t|")
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    columns: tuple[int, int, int | None] | None = None
    try:
        for cells in table:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if columns is None:
                is_header, columns = _columns(path, cells, separator)
                if is_header:
                    continue
            fields = [cells[column] if column is not None and column < len(cells) else "" for column in columns]
            yield TableLine(f"line {table.line_num}", *fields)
    except csv.Error as error:
        message = f"{path}: line {table.line_num}: not CSV ({error}); expected {_COLUMNS}."
        raise DataError(message, file=path, where=f"line {table.line_num}") from error


def _columns(path: Path, cells: list[str], separator: str) -> tuple[bool, tuple[int, int, int | None]]:
    """Whether the first line is a header, and the columns of path, label and split."""
    words = [cell.lower() for cell in cells]
    file, label, split = (next((words.index(w) for w in known if w in words), None) for known in (_PATHS, _LABELS, _SPLITS))
    if file is not None and label is not None:
        return True, (file, label, split)
    starts_with_file = is_image(Path(cells[0])) or (path.parent / cells[0]).is_file()
    if starts_with_file and 2 <= len(cells) <= 3:
        return False, (0, 1, 2 if len(cells) == 3 else None)
    first = f"the first line has {len(cells)} fields separated by {separator!r}: {some(cells)}"
    message = f"{path}: {first}; expected a header with path, label and optionally split, or lines of {_COLUMNS}."
    raise DataError(message, file=path, where="heading", given=tuple(cells), expected=("path", "label", "split"))


def _separator(text: str, separators: str = ",;\t|") -> str:
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(separators, key=first.count)  # the first of equally frequent ones


def _jsonl_lines(path: Path) -> Iterator[TableLine]:
    for number, text in enumerate(read_utf8(path).splitlines(), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            message = f"{path}: line {number}: not JSON ({error.msg}); expected one object per line."
            raise DataError(message, file=path, where=f"line {number}", expected="JSON") from error
        if not isinstance(record, dict):
            message = f"{path}: line {number}: {text[:30]!r}; expected an object with file_name and label."
            raise DataError(message, file=path, where=f"line {number}", given=record, expected=("file_name", "label"))
        words = {str(key).lower(): _cell(value) for key, value in record.items()}
        cells = (next((words[word] for word in known if word in words), "") for known in (_PATHS, _LABELS, _SPLITS))
        yield TableLine(f"line {number}", *cells)


def _cell(value: object) -> str:
    """Text of a JSON value; a list stays JSON."""
    return "" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value).strip()


def _has_labels(path: Path) -> bool:
    """Whether a metadata table has a label column; a table of captions has none."""
    first = next((line for line in read_utf8(path).splitlines() if line.strip()), "")
    if path.suffix == ".csv":
        words = [word.strip().strip('"').lower() for word in first.split(_separator(first))]
    else:
        try:
            words = [str(key).lower() for key in json.loads(first)]
        except (json.JSONDecodeError, TypeError):
            return True  # the reader raises the error
    return any(word in _LABELS for word in words)
