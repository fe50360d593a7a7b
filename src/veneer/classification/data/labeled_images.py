"""Labeled images of any source: names, labels and splits, and access to each image's bytes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from PIL import Image

from veneer.training.data.image_io import DataError, PhotoLimits, decode
from veneer.training.data.latent_cache import cache_key

Split = Literal["train", "validation", "test"]
SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    "test": "test",
}
LIMITS = PhotoLimits(min_side=2, max_aspect=100)


@dataclass(frozen=True)
class Example:
    """One labeled image.

    Args:
        name: unique in its source and independent of the machine: a path with forward slashes, or a row number.
        label: index of its class in `Source.classes`.
        split: its split in the data, or None if the data has no splits.
        others: further labels of an image with several, ascending after `label`.
    """

    name: str
    label: int
    split: Split | None = None
    others: tuple[int, ...] = ()

    @property
    def labels(self) -> tuple[int, ...]:
        """All labels, ascending."""
        return (self.label, *self.others)


@dataclass(frozen=True)
class Source:
    """Labeled images, sorted by name.

    Args:
        where: path or name of the source, for messages.
        classes: names of the classes, sorted.
        examples: the images, sorted by name.
        content: reads the bytes of an image's file. Raises DataError. Can be pickled, for other processes.
        notes: sentences on what was ignored while reading.
        hashes: BLAKE2b of the bytes by name, as far as they have been read; see `check_images`.
        mirror: whether a mirrored image still belongs to its class; False for digits.
        limits: limits of the decoder.
        multi_label: whether images may have several labels.
    """

    where: str
    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    content: Callable[[Example], bytes] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    mirror: bool = True
    limits: PhotoLimits = LIMITS
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, example: Example) -> Image.Image:
        """Decodes an image to RGB, with its EXIF orientation applied. Thread-safe.

        Raises:
            DataError: the image cannot be read, or its bytes have changed since the check.
        """
        data = self.content(example)
        known = self.hashes.get(example.name)
        if known is not None and known != hash_of(data):
            raise DataError(
                f"{self.where}: {example.name} has changed since it was checked. Do not change images during a run.",
                file=example.name,
                given="changed",
            )
        return decode(data, example.name, self.limits, remarks=False).rgb

    @cached_property
    def digest(self) -> str:
        """Hash of classes, names, labels and splits, without the image bytes."""
        rows = (f"{each.name}\n{','.join(map(str, each.labels))}\n{each.split}" for each in self.examples)
        return cache_key(len(self.classes), *self.classes, *rows)

    @property
    def has_splits(self) -> bool:
        """Whether the data has splits."""
        return any(each.split is not None for each in self.examples)

    def counts(self, split: Split | None = None) -> dict[str, int]:
        """Number of images of each class, in one split or in all."""
        counts = Counter(label for each in self.examples if split is None or each.split == split for label in each.labels)
        return {name: counts[label] for label, name in enumerate(self.classes)}

    def filter(self, predicate: Callable[[Example], bool]) -> "Source":
        """The examples that satisfy `predicate`, without empty classes; labels are renumbered."""
        remaining = [each for each in self.examples if predicate(each)]
        old = sorted({label for each in remaining for label in each.labels})
        new = {label: index for index, label in enumerate(old)}
        examples = tuple(_with_labels(each, [new[label] for label in each.labels]) for each in remaining)
        return replace(self, classes=tuple(self.classes[label] for label in old), examples=examples)

    def without_labels(self, labels: Collection[int]) -> "Source":
        """The source without some labels, and without the images that have no other; labels are renumbered."""
        rows = [(each, [label for label in each.labels if label not in labels]) for each in self.examples]
        examples = tuple(_with_labels(each, of_image) for each, of_image in rows if of_image)
        return replace(self, examples=examples).filter(lambda each: True)

    def label_text(self, example: Example) -> str:
        """Name of an example's class; of several, joined by a bar."""
        return "|".join(self.classes[label] for label in example.labels)


def _with_labels(example: Example, labels: Sequence[int]) -> Example:
    return replace(example, label=labels[0], others=tuple(labels[1:]))


class LabeledRow(NamedTuple):
    """An image as found by a reader: its name, the name of its class, its split, and the names of further classes."""

    name: str
    label: str
    split: Split | None
    others: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all classes."""
        return (self.label, *self.others)


def hash_of(data: bytes) -> str:
    """BLAKE2b of a file's bytes, 40 hex digits."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def assemble(
    where: str,
    rows: Iterable[LabeledRow],
    content: Callable[[Example], bytes],
    notes: Sequence[str] = (),
    multi_label: bool = False,
) -> Source:
    """Builds a source from rows in any order.

    Raises:
        DataError: no rows; duplicate names; splits without train.
    """
    ordered = sorted(rows, key=lambda row: row.name)
    if not ordered:
        message = f"{where}: no labeled images; expected images of at least two classes."
        raise DataError(message, file=where, where="classes", given=0)
    duplicates = [name for name, count in Counter(row.name for row in ordered).items() if count > 1]
    if duplicates:
        message = f"{where}: {some(duplicates)} listed more than once; expected each image once. Remove the duplicates."
        raise DataError(message, file=where, where="copies", given=tuple(duplicates))
    splits = {row.split for row in ordered}
    if splits != {None} and "train" not in splits:
        names = sorted(map(str, splits))
        message = f"{where}: splits {some(names)}; expected one named train."
        raise DataError(message, file=where, where="splits", given=tuple(names), expected="train")
    classes = tuple(sorted({name for row in ordered for name in row.labels}))
    label_of = {name: label for label, name in enumerate(classes)}
    indices = [sorted(label_of[name] for name in row.labels) for row in ordered]
    examples = [Example(row.name, labels[0], row.split, tuple(labels[1:])) for row, labels in zip(ordered, indices, strict=True)]
    return Source(where, classes, tuple(examples), content, tuple(notes), multi_label=multi_label)


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names as a list in a sentence, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
