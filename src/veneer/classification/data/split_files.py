"""`splits.json`: the images of every split with their hashes, so that another run uses the same splits or raises an error."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.atomic_files import write_atomically
from veneer.training.data.image_io import DataError

from .labeled_images import Source, some
from .splits import Splits, digest_of, hashes_of

_FORM = 1
_SPLIT_NAMES = ("train", "validation", "test")


def save_splits(splits: Splits, source: Source, path: Path, options: Mapping[str, Any] | None = None) -> None:
    """Writes splits: seed, shots, classes, and one line per image with name, class and hash.

    Args:
        options: name to value of the options that they were made with, for `check_options`.
    """
    hashes = hashes_of(source)

    def lines(indices: Sequence[int]) -> list[list[str]]:
        return [[source.examples[i].name, source.label_text(source.examples[i]), hashes[i]] for i in indices]

    table: dict[str, Any] = {"form": _FORM, "seed": splits.seed, "shots": splits.shots, "made": list(splits.made)}
    table |= {"classes": list(source.classes), "pictures": len(source), "digest": splits.digest, "notes": list(splits.notes)}
    table |= {"options": dict(options)} if options else {}
    text = json.dumps(table, indent=1, ensure_ascii=False)[:-2]
    for name in _SPLIT_NAMES:
        rows = ",\n  ".join(json.dumps(line, ensure_ascii=False) for line in lines(getattr(splits, name)))
        text += f',\n "{name}": [\n  {rows}\n ]'
    write_atomically(path, (text + "\n}\n").encode())


def check_options(path: Path, options: Mapping[str, Any]) -> None:
    """Raises if the splits of a file were made with other options than these. Files without options are not checked.

    Raises:
        DataError: with the first option that differs as `where`.
    """
    for name, saved in _read(path).get("options", {}).items():
        if name in options and options[name] != saved:
            message = f"{path}: {name} is {options[name]}; expected {saved}, as in this file. Use this value, or another folder."
            raise DataError(message, file=path, where=name, given=options[name], expected=saved)


def load_splits(path: Path, source: Source) -> Splits:
    """Reads splits, as indices in `source`. Images that were added since are not used, with a note.

    Raises:
        DataError: missing or invalid file; other classes; images that are missing, or have another label or other bytes.
    """
    table = _read(path)
    if table["classes"] != list(source.classes):
        raise DataError(
            f"{path}: splits of the classes {some(table['classes'])}, but {source.where} has {some(source.classes)}. "
            "Use the original data, or start a new run.",
            file=path,
            where="classes",
            given=source.classes,
            expected=tuple(table["classes"]),
        )
    hashes = hashes_of(source)
    index_of = {each.name: index for index, each in enumerate(source.examples)}
    problems: list[DataError] = []
    splits = [tuple(sorted(_indices(table[name], source, hashes, index_of, problems))) for name in _SPLIT_NAMES]
    if problems:
        listing = "".join(f"\n  {each}" for each in problems[:8]) + (f"\n  and {len(problems) - 8:,} more" * (len(problems) > 8))
        message = f"{path}: {source.where} has changed; restore it, or start a new run:{listing}"
        raise DataError(message, file=path, where="pictures", given=tuple(problems))
    if digest_of(source, hashes, splits) != table["digest"]:
        message = f"{path}: the digest does not match, so that the file was edited or truncated. Start a new run."
        raise DataError(message, file=path, where="digest")
    notes = list(table["notes"])
    new = len(source) - table["pictures"]
    if new > 0:
        notes.append(f"{path}: {new:,} images were added to {source.where} since and are not used. Start a new run to use them.")
    made = tuple(table["made"])
    return Splits(splits[0], splits[1], splits[2], table["seed"], table["shots"], made, tuple(notes), table["digest"])


def _indices(
    lines: list[list[str]], source: Source, hashes: Sequence[str], index_of: dict[str, int], problems: list[DataError]
) -> Iterator[int]:
    """Indices of the images of a split; images that are missing or have changed are added to `problems`."""
    for name, label, value in lines:
        index = index_of.get(name)
        if index is None:
            problems.append(DataError(f"{name}: missing or unreadable", where=name, given="missing"))
            continue
        current = source.label_text(source.examples[index])
        if current != label:
            problems.append(DataError(f"{name}: class {current}; expected {label}", where=name, given=current, expected=label))
        elif hashes[index] != value:
            problems.append(DataError(f"{name}: the file has changed", where=name, given="changed"))
        yield index


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["form"] == _FORM and all(len(line) == 3 for name in _SPLIT_NAMES for line in table[name]):
            [table[word] for word in ("seed", "shots", "made", "classes", "pictures", "digest", "notes")]
            return table
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected the splits.json of a run. Check the path.",
            file=path,
            given="unreadable",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path}: not a valid splits.json ({error!r}). Start a new run."
        raise DataError(message, file=path, given="damaged") from error
    message = (
        f"{path}: format version {table['form']!r}; expected {_FORM}. Start a new run, or use the veneer version that wrote it."
    )
    raise DataError(message, file=path, where="form", given=table["form"], expected=_FORM)
