"""Labeled images in the folders of published benchmarks: tasks of VTAB-1k, of FGVC, and datasets with CoOp's splits."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from veneer.training.data.image_io import DataError

from .image_folder import is_inside, reader
from .labeled_images import LabeledRow, Source, Split, assemble

IMAGE_FOLDERS = (
    "", "images", "Images", "101_ObjectCategories", "jpg", "SUN397", "2750", "UCF-101-midframes",
)  # fmt: skip
"""Folders that the paths of FGVC's and CoOp's files start at."""
_SPLITS: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "validation"), ("test", "test"))
_AIRCRAFT = "images_variant_{}.txt"


class _Line(NamedTuple):
    path: str
    label: str
    split: Split


def benchmark_reader(root: Path) -> Callable[[Path], Source] | None:
    """The reader of a folder with the split files of a benchmark; None for other folders."""
    if all((root / name).is_file() for name in ("train800.txt", "val200.txt", "test.txt")):
        return read_vtab
    if all((root / f"{name}.json").is_file() for name, _ in _SPLITS):
        return read_fgvc
    if coop_file(root) is not None or (root / _AIRCRAFT.format("train")).is_file():
        return read_coop
    return None


def read_vtab(root: Path) -> Source:
    """Reads a task of VTAB-1k: `train800.txt`, `val200.txt` and `test.txt` with lines of path and class number.

    The classes are named by their numbers. The layout is that of NOAH, SSF and FacT.

    Raises:
        DataError: an invalid line, or missing images.
    """
    files: tuple[tuple[str, Split], ...] = (("train800.txt", "train"), ("val200.txt", "validation"), ("test.txt", "test"))
    return _source(root, _numbered([line for name, split in files for line in _vtab_lines(root / name, split)]), ("",))


def read_fgvc(root: Path) -> Source:
    """Reads a dataset of FGVC: `train.json`, `val.json` and `test.json` with objects of path and class number.

    Paths start at the folder, at `images` or at `Images`, as in VPT. The classes are named by their numbers.

    Raises:
        DataError: an invalid file, or missing images.
    """
    lines: list[_Line] = []
    for name, split in _SPLITS:
        table = _json(root / f"{name}.json")
        if not isinstance(table, dict):
            raise _invalid(root / f"{name}.json", type(table).__name__, "an object of paths and class numbers")
        for path, label in table.items():
            if not str(label).isdecimal():
                raise _invalid(root / f"{name}.json", repr(label), "a class number", path)
        lines += [_Line(path, str(label), split) for path, label in table.items()]
    return _source(root, _numbered(lines), IMAGE_FOLDERS)


def read_coop(root: Path) -> Source:
    """Reads a dataset with CoOp's splits: `split_zhou_NAME.json` with [path, number, class name], or FGVC-Aircraft's lists.

    Underscores in class names are spaces, as in CoOp's prompts.

    Raises:
        DataError: an invalid file, or missing images.
    """
    return _source(root, [line._replace(label=line.label.replace("_", " ")) for line in coop_lines(root)], IMAGE_FOLDERS)


def coop_lines(root: Path) -> list[_Line]:
    """Path, class name and split of each image in the order of CoOp's files, on which few-shot samples depend.

    Raises:
        DataError: an invalid file.
    """
    file = coop_file(root)
    if file is None:
        return [line for name, split in _SPLITS for line in _aircraft_lines(root / _AIRCRAFT.format(name), split)]
    table = _json(file)
    try:
        lines = [_Line(path, name, split) for key, split in _SPLITS for path, _, name in table[key]]
        if not all(isinstance(text, str) for line in lines for text in (line.path, line.label)):
            raise TypeError("path and class name must be texts")
        return lines
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid(file, repr(error), "train, val and test with lists of [path, number, class name]") from error


def coop_classes(root: Path) -> list[str]:
    """Names of the classes of a dataset with CoOp's splits, as of `read_coop`, in the order of their numbers.

    FGVC-Aircraft's are numbered by `variants.txt`.

    Raises:
        DataError: an invalid or missing file, or a name with two numbers.
    """
    file = coop_file(root)
    if file is None:
        return [name.replace("_", " ") for name in _text_lines(root / "variants.txt")]
    coop_lines(root)  # checks the file
    table = _json(file)
    numbers = {(number, name) for key, _ in _SPLITS for _, number, name in table[key]}
    if len(numbers) != len({name for _, name in numbers}) or not all(isinstance(number, int) for number, _ in numbers):
        raise _invalid(file, "a class with several numbers, or without one", "one number for each class name")
    return [name.replace("_", " ") for _, name in sorted(numbers)]


def coop_file(root: Path) -> Path | None:
    """The `split_zhou_NAME.json` of a dataset, or None."""
    return next(iter(sorted(root.glob("split_zhou_*.json"))), None)


def image_folder(root: Path, path: str, folders: Iterable[str] = IMAGE_FOLDERS) -> str:
    """Folder below `root` that `path` starts at; "" if the path is missing in all."""
    return next((folder for folder in folders if (root / folder / path).is_file()), "")


def _source(root: Path, lines: list[_Line], folders: Iterable[str]) -> Source:
    """The images of a list. All paths start at the same folder, and stay inside `root`."""
    outside = [line.path for line in lines if not is_inside(root / line.path, root)]
    if outside:
        message = f"{root}: {outside[0]!r} is outside the folder; expected paths inside it. Download the split files again."
        raise DataError(message, file=root, where="paths", given=tuple(outside[:8]), expected="inside")
    start = image_folder(root, lines[0].path, folders) if lines else ""
    rows = [LabeledRow(f"{start}/{line.path}" if start else line.path, line.label, line.split) for line in lines]
    paths = {row.name: root / row.name for row in rows}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        message = f"{root}: {len(missing):,} of {len(paths):,} images are missing, first {missing[0]}. Download them again."
        raise DataError(message, file=root, where="images", given=tuple(missing[:8]), expected=len(paths))
    return assemble(str(root), rows, reader(paths))


def _numbered(lines: list[_Line]) -> list[_Line]:
    """Lines with class numbers of equal width, which sort as numbers do."""
    width = max((len(line.label) for line in lines), default=0)
    return [line._replace(label=line.label.zfill(width)) for line in lines]


def _vtab_lines(file: Path, split: Split) -> Iterator[_Line]:
    for number, line in enumerate(_text_lines(file), 1):
        path, _, label = line.rpartition(" ")
        if not path or not label.isdecimal():
            raise _invalid(file, line, "a path and a class number", f"line {number}")
        yield _Line(path.strip(), label, split)


def _aircraft_lines(file: Path, split: Split) -> Iterator[_Line]:
    for number, line in enumerate(_text_lines(file), 1):
        name, _, label = line.partition(" ")
        if not label:
            raise _invalid(file, line, "an image number and a variant", f"line {number}")
        yield _Line(f"{name}.jpg", label.strip(), split)


def _text_lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(file, repr(error), "a text file") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _invalid(file, repr(error), "a JSON file") from error


def _invalid(file: Path, given: str, expected: str, where: str = "content") -> DataError:
    message = f"{file}: {where}: {given}; expected {expected}. Download the file again."
    return DataError(message, file=file, where=where, given=given, expected=expected)
