"""Every picture is opened before training: what cannot be used is named and left out, and what looks wrong is said."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from veneer.training.data.image_io import DataError, decode

from .labeled_images import Example, Source, hash_of, some

_SHOWN = 12
_CHUNK = 1024


class Checked(NamedTuple):
    """What can be used, with the hashes of its bytes, and a line for everything that was found and done."""

    source: Source
    notes: tuple[str, ...]


class _Opened(NamedTuple):
    hash: str
    problem: str | None
    remarks: tuple[str, ...]


def check_pictures(
    source: Source,
    *,
    strict: bool = False,
    folder: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Decode every picture once, side by side, and leave out what training could not use.

    - Unreadable pictures (empty, cut off, no picture, beyond the limits) are left out, each with its reason.
    - A class that has pictures for validation or test only cannot be learnt: it is left out, with its pictures.
    - A class with one picture for training is kept; where splits are made, that picture is in train, so the class is not tested.
    - A class without pictures in the data's own test split is kept and named: it is not tested.

    Args:
        strict: an error, with everything that would be left out, in place of leaving out.
        folder: where `skipped.txt` is written if anything is left out: all of it, a line each; made if missing.
        threads: that decode side by side; None takes as many as there are cores, at most 16.
        progress: called in this thread with pictures done and pictures in all.

    Raises:
        DataError: fewer than two classes; a class of which no picture can be read; `strict` and something to leave out.
    """
    _check_classes(source)
    opened = _open_all(source, threads or min(16, os.cpu_count() or 1), progress)
    reasons = {each.name: seen.problem for each, seen in zip(source.examples, opened, strict=True) if seen.problem is not None}
    readable = source.keeping(lambda each: each.name not in reasons)
    emptied = sorted(set(source.classes) - set(readable.classes))
    if emptied:
        first = next(each for each in source.examples if source.classes[each.label] == emptied[0])
        raise DataError(
            f"{source.where}: no picture can be read of {some(emptied)}; expected at least one of each class. "
            f"The first: {reasons[first.name]} Replace them, or remove the class.",
            file=source.where,
            where="unreadable",
            given=tuple(emptied),
        )
    lost = _untrained(readable)
    for each in readable.examples:
        if each.label in lost:
            reasons[each.name] = f"{each.name}: {readable.classes[each.label]} has no picture for training"
    if reasons and strict:
        message = f"{source.where}: {len(reasons):,} of {len(source):,} pictures cannot be used:{_listing(reasons, None)}"
        raise DataError(message, file=source.where, where="pictures", given=tuple(reasons))
    usable = readable.keeping(lambda each: each.label not in lost)
    _check_classes(usable)
    hashes = {each.name: seen.hash for each, seen in zip(source.examples, opened, strict=True) if each.name not in reasons}
    notes = [*source.notes, *_left_out(source, reasons, folder)]
    notes += (f"{source.where}: {name}: pictures for validation or test only; left out." for name in _named(readable, lost))
    notes += [*_remarks(source, opened), *_thin_classes(usable)]
    return Checked(replace(usable, hashes=hashes), tuple(notes))


def _open_all(source: Source, threads: int, progress: Callable[[int, int], None] | None) -> list[_Opened]:
    found: list[_Opened] = []
    waiting = iter(source.examples)
    with _gathering() as heard, ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(waiting, _CHUNK)):
            for seen in pool.map(lambda each: _open(source, each, heard), chunk):
                found.append(seen)
                if progress is not None:
                    progress(len(found), len(source))
    return found


def _open(source: Source, example: Example, heard: threading.local) -> _Opened:
    heard.remarks = []
    try:
        data = source.content(example)
        picture = decode(data, example.name, source.limits, remarks=False)
    except DataError as error:
        return _Opened("", str(error), ())
    return _Opened(hash_of(data), None, (*picture.notes, *heard.remarks))


@contextmanager
def _gathering() -> Iterator[threading.local]:
    """Pillow's warnings in threads go to the thread's own list: filters belong to the process, so they are set here, once."""
    heard = threading.local()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: object) -> None:
            remarks = getattr(heard, "remarks", None)
            if remarks is None:
                shown(message, category, filename, lineno)
            elif not issubclass(category, DeprecationWarning):
                remarks.append(str(message))

        warnings.showwarning = show  # type: ignore[assignment]
        yield heard


def _untrained(source: Source) -> set[int]:
    """Classes of which the data's own splits have none to train on."""
    if not source.has_splits:
        return set()
    return set(range(len(source.classes))) - {each.label for each in source.examples if each.split == "train"}


def _named(source: Source, labels: set[int]) -> list[str]:
    return [source.classes[label] for label in sorted(labels)]


def _check_classes(source: Source) -> None:
    if len(source.classes) < 2:
        held = f"one class ({source.classes[0]})" if source.classes else "no class"
        raise DataError(
            f"{source.where}: {held} with pictures; expected at least two. If classes are folders one level further down, give "
            "the folder that holds them.",
            file=source.where,
            where="classes",
            given=source.classes,
            expected=2,
        )


def _listing(reasons: dict[str, str], everything: Path | None) -> str:
    lines = list(reasons.values())
    more = len(lines) - _SHOWN
    where = f"; all in {everything}" if everything else ""
    return "".join(f"\n  {line}" for line in lines[:_SHOWN]) + (f"\n  and {more:,} more{where}" if more > 0 else "")


def _left_out(source: Source, reasons: dict[str, str], folder: Path | None) -> Iterator[str]:
    if not reasons:
        return
    everything = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        everything = folder / "skipped.txt"
        everything.write_text("".join(f"{line}\n" for line in reasons.values()), encoding="utf-8")
    listing = _listing(reasons, everything)
    yield f"{source.where}: {len(reasons):,} of {len(source):,} pictures cannot be used; left out:{listing}"


def _remarks(source: Source, opened: Sequence[_Opened]) -> Iterator[str]:
    """What was done to pictures on the way, those alike in one line."""
    alike: dict[str, list[str]] = {}
    for example, seen in zip(source.examples, opened, strict=True):
        for remark in dict.fromkeys(seen.remarks):
            alike.setdefault(remark, []).append(example.name)
    for remark, names in alike.items():
        yield f"{source.where}: {len(names):,} used all the same: {remark}: {some(names)}."


def _thin_classes(source: Source) -> Iterator[str]:
    train = source.counts("train" if source.has_splits else None)
    single = [name for name, held in train.items() if held == 1]
    tested = {each.split for each in source.examples} >= {"test"}
    if single:
        untested = "" if tested else "; it trains, so the class is not tested"
        yield f"{source.where}: one picture only for training in {some(single)}{untested}. Add pictures."
    if tested:
        never = [name for name, held in source.counts("test").items() if not held]
        if never:
            yield f"{source.where}: no picture for testing in {some(never)}; accuracy says nothing of them."
