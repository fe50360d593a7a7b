"""A folder whose subfolders are classes, once or under train, validation and test."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from veneer.training.data.image_io import DataError, read_bytes
from veneer.training.data.photo_folder import READ, REFUSED

from .labeled_images import LIMITS, SPLITS, Example, Row, Source, Split, assemble, some

_JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def read_folder(root: Path) -> Source:
    """The pictures of `root/CLASS/…` or of `root/{train,validation,test}/CLASS/…`.

    - A folder called train, training, val, valid, validation, dev or test (in any case) is a split if it holds folders, and a
      class if it holds pictures only. Beside splits, other folders are passed over.
    - A picture at any depth under a class folder is of that class.
    - Hidden files, Thumbs.db, desktop.ini, __MACOSX and files with another ending than a picture's are passed over, and so are
      pictures outside the class folders and class folders without any. `Source.notes` names all but hidden and system files.

    Raises:
        DataError: no class folders, a folder that cannot be listed, two folders for one split, splits without train.
    """
    splits = _splits(root)
    passed, empty, rows, paths = [], [], [], {}
    for folder, split in splits.items() or ((root, None),):
        for child in visible(folder):
            if not child.is_dir():
                passed.append(child)
                continue
            found = 0
            for path in files(child):
                if not is_picture(path):
                    passed.append(path)
                    continue
                row = Row(_name(path, root), _nfc(child.name), split)
                rows.append(row)
                paths[row.name] = path
                found += 1
            if not found:
                empty.append(child)
    notes: list[str] = []
    if splits:
        notes += _beside(root, [each for each in visible(root) if each not in splits])
    notes += _outside(root, passed)
    if empty:
        names = some([_name(each, root) for each in empty])
        notes.append(f"{root}: no pictures in {names}; left out.")
    if not rows:
        message = f"{root}: {_held(root)}; expected folders named after the classes, with pictures in them."
        raise DataError(message, file=root, where="classes", given=tuple(path.name for path in visible(root)))
    return assemble(str(root), rows, reader(paths), notes)


def reader(paths: Mapping[str, Path]) -> Callable[[Example], bytes]:
    """Bytes by name; see `Source.content`."""

    def content(example: Example) -> bytes:
        return read_bytes(paths[example.name], LIMITS)

    return content


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden and system files."""
    try:
        held = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in _JUNK]
    except OSError as error:
        message = f"{folder}: cannot be listed ({error.strerror}). Check permissions."
        raise DataError(message, file=folder, given="unreadable") from error
    return sorted(held, key=lambda path: path.name)


def files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files under a folder at any depth; a link back to a folder above is not followed."""
    here = folder.resolve()
    if here in above:
        return
    for path in visible(folder):
        if path.is_dir():
            yield from files(path, above | {here})
        else:
            yield path


def is_picture(path: Path) -> bool:
    """Whether a file is called like a picture, readable or not."""
    return path.suffix.lower() in READ | REFUSED


def _splits(root: Path) -> dict[Path, Split]:
    found: dict[Path, Split] = {}
    for folder in visible(root):
        split = SPLITS.get(folder.name.lower())
        if split is None or not folder.is_dir() or not any(each.is_dir() for each in visible(folder)):
            continue
        if split in found.values():
            other = next(path for path, each in found.items() if each == split)
            message = f"{root}: {other.name} and {folder.name} are both for {split}; expected one. Join them."
            raise DataError(message, file=root, where=split, given=(other.name, folder.name))
        found[folder] = split
    return found


def _beside(root: Path, others: list[Path]) -> Iterator[str]:
    if others:
        names = some([each.name + "/" * each.is_dir() for each in others])
        yield f"{root}: has its own splits; passed over beside them: {names}."


def _outside(root: Path, passed: list[Path]) -> Iterator[str]:
    for word, held in (
        ("pictures outside the class folders", [each for each in passed if is_picture(each)]),
        ("files that are no pictures by their ending", [each for each in passed if not is_picture(each)]),
    ):
        if held:
            yield f"{root}: {len(held):,} {word}, passed over: {some([_name(each, root) for each in held])}."


def _held(root: Path) -> str:
    names = [each.name + "/" * each.is_dir() for each in visible(root)]
    return f"no class folders with pictures; it holds {some(names)}" if names else "it is empty"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # macOS may give the letters of a name taken apart


def _name(path: Path, root: Path) -> str:
    return _nfc(path.relative_to(root).as_posix())
