"""Splits on disk: `splits.json` names every picture of every split, so that another run uses the same ones or says why not."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.training.data.image_io import DataError
from veneer.training.loop.checkpoints import write_atomically

from .labeled_images import Source, some
from .splits import Splits, digest_of, hashes_of

_FORM = 1
_PARTS = ("train", "validation", "test")


def save_splits(splits: Splits, source: Source, path: Path) -> None:
    """Write the splits: seed, shots, classes, and a line for each picture: name, class, hash of its bytes."""
    hashes = hashes_of(source)

    def lines(places: Sequence[int]) -> list[list[str]]:
        return [[source.examples[i].name, source.classes[source.examples[i].label], hashes[i]] for i in places]

    table: dict[str, Any] = {"form": _FORM, "seed": splits.seed, "shots": splits.shots, "made": list(splits.made)}
    table |= {"classes": list(source.classes), "pictures": len(source), "digest": splits.digest, "notes": list(splits.notes)}
    text = json.dumps(table, indent=1, ensure_ascii=False)[:-2]
    for part in _PARTS:
        rows = ",\n  ".join(json.dumps(line, ensure_ascii=False) for line in lines(getattr(splits, part)))
        text += f',\n "{part}": [\n  {rows}\n ]'
    write_atomically(path, (text + "\n}\n").encode())


def load_splits(path: Path, source: Source) -> Splits:
    """The splits of a file, as places in `source`. Pictures that came later are left out, with a note.

    Raises:
        DataError: no such file or another one; other classes; pictures that are gone, or have another label or other bytes.
    """
    table = _read(path)
    if table["classes"] != list(source.classes):
        raise DataError(
            f"{path}: made for the classes {some(table['classes'])}; {source.where} has {some(source.classes)}. "
            "Use the data it was made for, or split anew.",
            file=path,
            where="classes",
            given=source.classes,
            expected=tuple(table["classes"]),
        )
    hashes = hashes_of(source)
    places = {each.name: place for place, each in enumerate(source.examples)}
    problems: list[DataError] = []
    held = [tuple(sorted(_found(table[part], source, hashes, places, problems))) for part in _PARTS]
    if problems:
        listing = "".join(f"\n  {each}" for each in problems[:8]) + (f"\n  and {len(problems) - 8:,} more" * (len(problems) > 8))
        message = f"{path}: {source.where} has changed since; restore it, or split anew:{listing}"
        raise DataError(message, file=path, where="pictures", given=tuple(problems))
    if digest_of(source, hashes, held) != table["digest"]:
        message = f"{path}: its lines do not match its digest; it was edited or cut. Split anew."
        raise DataError(message, file=path, where="digest")
    notes = list(table["notes"])
    new = len(source) - table["pictures"]
    if new > 0:
        notes.append(f"{path}: made when {source.where} had {new:,} pictures fewer; those are not used. Split anew to use them.")
    made = tuple(table["made"])
    return Splits(held[0], held[1], held[2], table["seed"], table["shots"], made, tuple(notes), table["digest"])


def _found(
    lines: list[list[str]], source: Source, hashes: Sequence[str], places: dict[str, int], problems: list[DataError]
) -> Iterator[int]:
    for name, label, value in lines:
        place = places.get(name)
        if place is None:
            problems.append(DataError(f"{name}: gone, or no longer readable", where=name, given="missing"))
            continue
        now = source.classes[source.examples[place].label]
        if now != label:
            problems.append(DataError(f"{name}: was {label}, is {now}", where=name, given=now, expected=label))
        elif hashes[place] != value:
            problems.append(DataError(f"{name}: other bytes than then", where=name, given="changed"))
        yield place


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["form"] == _FORM and all(len(line) == 3 for part in _PARTS for line in table[part]):
            [table[word] for word in ("seed", "shots", "made", "classes", "pictures", "digest", "notes")]
            return table
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected the splits.json of a run. Check the name.",
            file=path,
            given="unreadable",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path}: not the splits.json of a run ({error!r}). Split anew."
        raise DataError(message, file=path, given="damaged") from error
    message = f"{path}: of form {table['form']!r}; expected {_FORM}. Split anew, or use the version that wrote it."
    raise DataError(message, file=path, where="form", given=table["form"], expected=_FORM)
