"""Check of all images before training: unusable ones are skipped and reported, and suspicious data is noted."""

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

_LISTED = 12
_CHUNK = 1024


class CheckedSource(NamedTuple):
    """The usable images, with hashes of their bytes, and notes on what was found and skipped."""

    source: Source
    notes: tuple[str, ...]


class _ImageCheck(NamedTuple):
    hash: str
    problem: str | None
    remarks: tuple[str, ...]


def check_images(
    source: Source,
    *,
    strict: bool = False,
    folder: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckedSource:
    """Decodes every image once, in parallel, and skips images that cannot be used for training.

    - Unreadable images (empty, truncated, no image, outside the limits) are skipped, with the reason.
    - A class with images in validation or test only is skipped.
    - A class with one training image is kept; if splits are created, the image goes to train, so that the class is not tested.
    - A class without images in the data's own test split is kept and noted, because it is not tested.

    Args:
        strict: raise an error with all unusable images instead of skipping them.
        folder: where `skipped.txt` is written if images are skipped, one line per image; created if missing.
        threads: decoder threads (default: one per core, at most 16).
        progress: called in this thread with the number of checked images and of all images.

    Raises:
        DataError: fewer than two classes; a class without a readable image; with `strict`, an unusable image.
    """
    _check_classes(source)
    opened = _open_all(source, threads or min(16, os.cpu_count() or 1), progress)
    reasons = {each.name: check.problem for each, check in zip(source.examples, opened, strict=True) if check.problem is not None}
    readable = source.filter(lambda each: each.name not in reasons)
    unreadable = sorted(set(source.classes) - set(readable.classes))
    if unreadable:
        first = next(each for each in source.examples if source.classes.index(unreadable[0]) in each.labels)
        raise DataError(
            f"{source.where}: no readable image of {some(unreadable)}; expected at least one image of each class. "
            f"First error: {reasons[first.name]} Replace the images, or remove the class.",
            file=source.where,
            where="unreadable",
            given=tuple(unreadable),
        )
    untrained = _classes_without_training(readable)
    for each in readable.examples:
        if untrained.issuperset(each.labels):
            reasons[each.name] = f"{each.name}: {readable.label_text(each)} has no training image"
    if reasons and strict:
        message = f"{source.where}: {len(reasons):,} of {len(source):,} images cannot be used:{_listing(reasons, None)}"
        raise DataError(message, file=source.where, where="pictures", given=tuple(reasons))
    usable = readable.without_labels(untrained)
    _check_classes(usable)
    hashes = {each.name: check.hash for each, check in zip(source.examples, opened, strict=True) if each.name not in reasons}
    notes = [*source.notes, *_skipped(source, reasons, folder)]
    notes += (
        f"{source.where}: {readable.classes[label]}: images in validation or test only; class skipped."
        for label in sorted(untrained)
    )
    notes += [*_remarks(source, opened), *_small_classes(usable)]
    return CheckedSource(replace(usable, hashes=hashes), tuple(notes))


def _open_all(source: Source, threads: int, progress: Callable[[int, int], None] | None) -> list[_ImageCheck]:
    checks: list[_ImageCheck] = []
    remaining = iter(source.examples)
    with _collected_warnings() as collected, ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(remaining, _CHUNK)):
            for check in pool.map(lambda each: _open(source, each, collected), chunk):
                checks.append(check)
                if progress is not None:
                    progress(len(checks), len(source))
    return checks


def _open(source: Source, example: Example, collected: threading.local) -> _ImageCheck:
    collected.remarks = []
    try:
        data = source.content(example)
        image = decode(data, example.name, source.limits, remarks=False)
    except DataError as error:
        return _ImageCheck("", str(error), ())
    return _ImageCheck(hash_of(data), None, (*image.notes, *collected.remarks))


@contextmanager
def _collected_warnings() -> Iterator[threading.local]:
    """Collects Pillow's warnings per thread; filters are global, so that they are set here, once."""
    collected = threading.local()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        original = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: object) -> None:
            remarks = getattr(collected, "remarks", None)
            if remarks is None:
                original(message, category, filename, lineno)
            elif not issubclass(category, DeprecationWarning):
                remarks.append(str(message))

        warnings.showwarning = show  # type: ignore[assignment]
        yield collected


def _classes_without_training(source: Source) -> set[int]:
    """Labels of the classes that have no image in the data's own training split."""
    if not source.has_splits:
        return set()
    return set(range(len(source.classes))) - {n for each in source.examples if each.split == "train" for n in each.labels}


def _check_classes(source: Source) -> None:
    if len(source.classes) < 2:
        count = f"one class ({source.classes[0]})" if source.classes else "no class"
        raise DataError(
            f"{source.where}: {count} with images; expected at least two. If the class folders are one level deeper, pass their "
            "parent folder.",
            file=source.where,
            where="classes",
            given=source.classes,
            expected=2,
        )


def _listing(reasons: dict[str, str], skipped: Path | None) -> str:
    lines = list(reasons.values())
    more = len(lines) - _LISTED
    where = f"; all in {skipped}" if skipped else ""
    return "".join(f"\n  {line}" for line in lines[:_LISTED]) + (f"\n  and {more:,} more{where}" if more > 0 else "")


def _skipped(source: Source, reasons: dict[str, str], folder: Path | None) -> Iterator[str]:
    if not reasons:
        return
    skipped = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        skipped = folder / "skipped.txt"
        skipped.write_text("".join(f"{line}\n" for line in reasons.values()), encoding="utf-8")
    listing = _listing(reasons, skipped)
    yield f"{source.where}: {len(reasons):,} of {len(source):,} images cannot be used and are skipped:{listing}"


def _remarks(source: Source, opened: Sequence[_ImageCheck]) -> Iterator[str]:
    """Remarks on usable images, one line per remark."""
    names_by_remark: dict[str, list[str]] = {}
    for example, check in zip(source.examples, opened, strict=True):
        for remark in dict.fromkeys(check.remarks):
            names_by_remark.setdefault(remark, []).append(example.name)
    for remark, names in names_by_remark.items():
        yield f"{source.where}: {len(names):,} images used with a remark: {remark}: {some(names)}."


def _small_classes(source: Source) -> Iterator[str]:
    train = source.counts("train" if source.has_splits else None)
    single = [name for name, count in train.items() if count == 1]
    tested = {each.split for each in source.examples} >= {"test"}
    if single:
        untested = "" if tested else "; the class is therefore not tested"
        yield f"{source.where}: only one training image in {some(single)}{untested}. Add images."
    if tested:
        untested_classes = [name for name, count in source.counts("test").items() if not count]
        if untested_classes:
            yield f"{source.where}: no test image in {some(untested_classes)}; the test accuracy does not cover these classes."
