"""Folders that the `datasets` library writes: Parquet files, and the Arrow files of `save_to_disk`. pyarrow reads both."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer.training.data.image_io import DataError, read_bytes

from .image_folder import files
from .labeled_images import LIMITS, SPLITS, Example, Row, Source, Split, assemble, some

_IMAGES = ("image", "img", "picture", "photo")
_LABELS = ("label", "labels", "class", "category", "target", "fine_label")


class _Columns(NamedTuple):
    image: str
    label: str
    names: Sequence[str] | None


def row_files(root: Path) -> list[Path]:
    """The Parquet or Arrow files of such a folder, sorted; none where it is another."""
    held = [path for path in files(root) if path.suffix in (".parquet", ".arrow")]
    return sorted(
        (path for path in held if not path.name.startswith("cache-")), key=lambda path: path.relative_to(root).as_posix()
    )


def read_rows(root: Path, tables: Sequence[Path]) -> Source:
    """The pictures of Parquet or Arrow files. The split is in the name of the folder or file (`train/…`, `data/test-00000…`);
    files without such a name have none. Parquet files are held in memory, Arrow files are mapped.

    Raises:
        DataError: pyarrow is missing, a damaged file, no column of pictures or of labels.
    """
    rows, cells, unlabelled = [], {}, 0
    counts: dict[str, int] = {}
    for path in tables:
        table = _table(path)
        columns = _columns(path, table.schema)
        split = _split(path.relative_to(root))
        word = split or "row"
        for picture, label in zip(_places(table, columns.image), table.column(columns.label).to_pylist(), strict=True):
            name = f"{word}/{counts.get(word, 0):07d}"
            counts[word] = counts.get(word, 0) + 1
            if label is None or (columns.names and label == -1):
                unlabelled += 1
                continue
            rows.append(Row(name, _class(path, label, columns.names), split))
            cells[name] = picture
    notes = [f"{root}: {unlabelled:,} rows without a label; left out."] if unlabelled else []

    def content(example: Example) -> bytes:
        column, place = cells[example.name]
        return _bytes(column[place].as_py(), root, example.name)

    return assemble(str(root), rows, content, notes)


def _table(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading {path.suffix} files needs pyarrow, which is not installed. pip install datasets (or pyarrow), or "
            "give a folder of classes or a CSV of path,label.",
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
        message = f"{path}: damaged or cut off ({error}). Copy, download or export it again."
        raise DataError(message, file=path, given="damaged") from error


def _columns(path: Path, schema: Any) -> _Columns:
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    images = [name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == "Image"]
    labels = [name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == "ClassLabel"]
    image = next(iter([*images, *(name for name in _IMAGES if name in schema.names)]), None)
    known = [name for name in _LABELS if name in schema.names]
    label = next((name for name in known if name in labels), None) or next(iter([*labels, *known]), None)
    if image is None or label is None:
        missing = "pictures (image)" if image is None else "labels (label)"
        message = f"{path}: columns {some(schema.names)}; expected one of {missing}. Rename the column."
        expected = "image" if image is None else "label"
        raise DataError(message, file=path, where="columns", given=tuple(schema.names), expected=expected)
    return _Columns(image, label, features[label].get("names") if label in labels else None)


def _places(table: Any, name: str) -> Iterator[tuple[Any, int]]:
    """Chunk and place of every row: nothing is copied yet."""
    return ((chunk, place) for chunk in table.column(name).chunks for place in range(len(chunk)))


def _class(path: Path, label: object, names: Sequence[str] | None) -> str:
    if not names:
        return str(label)
    if not isinstance(label, int) or not 0 <= label < len(names):
        message = f"{path}: label {label!r}; expected 0 to {len(names) - 1}, for the file names {len(names)} classes."
        raise DataError(message, file=path, where="label", given=label, expected=len(names))
    return names[label]


def _split(path: Path) -> Split | None:
    """From `train/a.parquet`, `data/train-00000-of-00002.parquet` or `train_1.parquet`."""
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
    message = f"{root}: {name}: no bytes and no path of a picture. Write the dataset again with its pictures inside."
    raise DataError(message, file=root, where=name)
