"""Dataset folders of Hugging Face `datasets`: Parquet files, and the Arrow files of `save_to_disk`, read with pyarrow."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from veneer.training.data.image_io import DataError, read_bytes

from .image_folder import files
from .labeled_images import LIMITS, SPLITS, Example, LabeledRow, Source, Split, assemble, some
from .multi_label.label_cells import LabelCellError, parse_labels

_IMAGES = ("image", "img", "picture", "photo")
_LABELS = ("label", "labels", "class", "category", "target", "fine_label")


class _Columns(NamedTuple):
    image: str
    label: str
    names: Sequence[str] | None


def row_files(root: Path) -> list[Path]:
    """The Parquet or Arrow files of a folder, sorted; empty if it has none."""
    tables = [path for path in files(root) if path.suffix in (".parquet", ".arrow")]
    return sorted(
        (path for path in tables if not path.name.startswith("cache-")), key=lambda path: path.relative_to(root).as_posix()
    )


def read_rows(root: Path, tables: Sequence[Path], multi_label: bool = False) -> Source:
    """Reads Parquet or Arrow files. The split is taken from the name of the folder or file (`train/…`, `data/test-00000…`), if it
    has one. Parquet files are loaded into memory, Arrow files are memory-mapped.

    Args:
        multi_label: cells are lists of labels, or texts as in tables.
    Raises:
        DataError: pyarrow is missing, a file is damaged, or there is no image or label column.
    """
    rows, cells, unlabeled = [], {}, 0
    counts: dict[str, int] = {}
    for path in tables:
        table = _table(path)
        columns = _columns(path, table.schema)
        split = _split(path.relative_to(root))
        word = split or "row"
        for image, label in zip(_cells(table, columns.image), table.column(columns.label).to_pylist(), strict=True):
            name = f"{word}/{counts.get(word, 0):07d}"
            counts[word] = counts.get(word, 0) + 1
            if label is None or (columns.names and label == -1):
                unlabeled += 1
                continue
            labels = _classes(path, name, label, columns.names, multi_label)
            rows.append(LabeledRow(name, labels[0], split, labels[1:]))
            cells[name] = image
    notes = [f"{root}: {unlabeled:,} rows without a label skipped."] if unlabeled else []
    return assemble(str(root), rows, partial(_content, cells, root), notes, multi_label)


def _content(cells: Mapping[str, tuple[Any, int]], root: Path, example: Example) -> bytes:
    column, row = cells[example.name]
    return _bytes(column[row].as_py(), root, example.name)


def _table(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading {path.suffix} files requires pyarrow, which is not installed. pip install datasets (or pyarrow), "
            "or use a folder of classes or a CSV of path,label.",
            file=path,
            expected="pyarrow",
        ) from error
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.ParquetFile(path).read()
        mapped = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(mapped).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(mapped).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        message = f"{path}: the file is corrupt ({error}). Copy, download or export it again."
        raise DataError(message, file=path, given="damaged") from error


def _columns(path: Path, schema: Any) -> _Columns:
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    images = [name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == "Image"]
    kinds = {name: _element(each) for name, each in features.items()}
    labels = [name for name, each in kinds.items() if isinstance(each, dict) and each.get("_type") == "ClassLabel"]
    image = next(iter([*images, *(name for name in _IMAGES if name in schema.names)]), None)
    known = [name for name in _LABELS if name in schema.names]
    label = next((name for name in known if name in labels), None) or next(iter([*labels, *known]), None)
    if image is None or label is None:
        expected = "image" if image is None else "label"
        message = f"{path}: columns {some(schema.names)}; expected a column {expected}. Rename the column."
        raise DataError(message, file=path, where="columns", given=tuple(schema.names), expected=expected)
    return _Columns(image, label, kinds[label].get("names") if label in labels else None)


def _element(feature: Any) -> Any:
    """The feature of the entries of a list feature, or the feature itself."""
    nested = feature.get("feature") if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List") else None
    return feature if nested is None else nested


def _cells(table: Any, name: str) -> Iterator[tuple[Any, int]]:
    """Chunk and index of every row of a column, without copying."""
    return ((chunk, row) for chunk in table.column(name).chunks for row in range(len(chunk)))


def _classes(path: Path, row: str, label: object, names: Sequence[str] | None, multi_label: bool) -> tuple[str, ...]:
    """Names of the classes of a cell."""
    if isinstance(label, list) and multi_label and label:
        return tuple(dict.fromkeys(_class(path, each, names) for each in label))
    if not isinstance(label, list) and (names or not multi_label):
        return (_class(path, label, names),)
    try:
        return parse_labels(json.dumps(label) if isinstance(label, list) else str(label), multi_label)
    except LabelCellError as error:
        message = f"{path}: {row}: {error}"
        raise DataError(message, file=path, where=row, given=error.given, expected=error.expected) from error


def _class(path: Path, label: object, names: Sequence[str] | None) -> str:
    if not names:
        return str(label)
    if not isinstance(label, int) or not 0 <= label < len(names):
        message = f"{path}: label {label!r}; expected 0 to {len(names) - 1}, because the file has {len(names)} class names."
        raise DataError(message, file=path, where="label", given=label, expected=len(names))
    return names[label]


def _split(path: Path) -> Split | None:
    """The split of paths such as `train/a.parquet`, `data/train-00000-of-00002.parquet` or `train_1.parquet`."""
    for part in reversed((*path.parts[:-1], path.stem)):
        split = SPLITS.get(re.split(r"[-_.\d]", part.lower())[0])
        if split is not None:
            return split
    return None


def _bytes(cell: Any, root: Path, name: str) -> bytes:
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"]
    if isinstance(cell, dict) and cell.get("path"):
        return read_bytes(root / cell["path"], LIMITS)
    message = f"{root}: {name}: the cell has neither image bytes nor a path. Save the dataset again with embedded images."
    raise DataError(message, file=root, where=name)
