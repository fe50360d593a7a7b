"""Image folders: one subfolder per class, at the top level or below train, validation and test."""

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from veneer.training.data.image_io import DataError, read_bytes
from veneer.training.data.photo_folder import READ, REFUSED

from .labeled_images import LIMITS, SPLITS, Example, LabeledRow, Source, Split, assemble, some

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def read_folder(root: Path) -> Source:
    """Reads the images of `root/CLASS/…` or of `root/{train,validation,test}/CLASS/…`.

    - A folder named train, training, val, valid, validation, dev or test (case-insensitive) is a split if it contains folders,
      and a class if it contains images only. Next to splits, other folders are ignored.
    - Images at any depth below a class folder belong to that class.
    - Ignored are: hidden files, Thumbs.db, desktop.ini, __MACOSX, files without an image suffix, images outside the class
      folders, and empty class folders. `Source.notes` lists them, except hidden and system files.

    Raises:
        DataError: no class folders, a folder that cannot be listed, two folders for one split, splits without train.
    """
    splits = _splits(root)
    ignored, empty, rows, paths = [], [], [], {}
    for folder, split in splits.items() or ((root, None),):
        for child in visible(folder):
            if not child.is_dir():
                ignored.append(child)
                continue
            count = 0
            for path in files(child):
                if not is_image(path):
                    ignored.append(path)
                    continue
                row = LabeledRow(_name(path, root), _nfc(child.name), split)
                rows.append(row)
                paths[row.name] = path
                count += 1
            if not count:
                empty.append(child)
    notes: list[str] = []
    if splits:
        notes += _ignored_folders(root, [each for each in visible(root) if each not in splits])
    notes += _ignored_files(root, ignored)
    if empty:
        names = some([_name(each, root) for each in empty])
        notes.append(f"{root}: no images in {names}; skipped.")
    if not rows:
        message = f"{root}: {_contents(root)}; expected one folder per class, with images."
        raise DataError(message, file=root, where="classes", given=tuple(path.name for path in visible(root)))
    return assemble(str(root), rows, reader(paths), notes)


def is_inside(path: Path, folder: Path) -> bool:
    """True if a path is below a folder; links are not followed."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def reader(paths: Mapping[str, Path]) -> Callable[[Example], bytes]:
    """A reader of image bytes by name; see `Source.content`."""
    return partial(_content, paths)


def _content(paths: Mapping[str, Path], example: Example) -> bytes:
    return read_bytes(paths[example.name], LIMITS)


def visible(folder: Path) -> list[Path]:
    """Entries of a folder, sorted by name, without hidden and system files."""
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in _SYSTEM_FILES]
    except OSError as error:
        message = f"{folder}: cannot be listed ({error.strerror}). Check permissions."
        raise DataError(message, file=folder, given="unreadable") from error
    return sorted(entries, key=lambda path: path.name)


def files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below a folder at any depth; links to a parent folder are not followed."""
    here = folder.resolve()
    if here in above:
        return
    for path in visible(folder):
        if path.is_dir():
            yield from files(path, above | {here})
        else:
            yield path


def is_image(path: Path) -> bool:
    """Whether a file name has an image suffix, of a supported or unsupported format."""
    return path.suffix.lower() in READ | REFUSED


def _splits(root: Path) -> dict[Path, Split]:
    found: dict[Path, Split] = {}
    for folder in visible(root):
        split = SPLITS.get(folder.name.lower())
        if split is None or not folder.is_dir() or not any(each.is_dir() for each in visible(folder)):
            continue
        if split in found.values():
            other = next(path for path, each in found.items() if each == split)
            message = f"{root}: {other.name} and {folder.name} are both the {split} split; expected one folder. Merge them."
            raise DataError(message, file=root, where=split, given=(other.name, folder.name))
        found[folder] = split
    return found


def _ignored_folders(root: Path, others: list[Path]) -> Iterator[str]:
    if others:
        names = some([each.name + "/" * each.is_dir() for each in others])
        yield f"{root}: has its own splits; ignored next to them: {names}."


def _ignored_files(root: Path, ignored: list[Path]) -> Iterator[str]:
    for kind, paths in (
        ("images outside the class folders", [each for each in ignored if is_image(each)]),
        ("files without an image suffix", [each for each in ignored if not is_image(each)]),
    ):
        if paths:
            yield f"{root}: {len(paths):,} {kind} ignored: {some([_name(each, root) for each in paths])}."


def _contents(root: Path) -> str:
    names = [each.name + "/" * each.is_dir() for each in visible(root)]
    return f"no class folders with images; it contains {some(names)}" if names else "the folder is empty"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # macOS returns decomposed names


def _name(path: Path, root: Path) -> str:
    return _nfc(path.relative_to(root).as_posix())
