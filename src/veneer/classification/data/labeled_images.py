"""Labelled pictures, wherever they come from: names, labels and splits, and one door to each picture's bytes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """One labelled picture.

    Args:
        name: unique in its source and the same on every machine: a path with forward slashes, or a row's number.
        label: place of its class in `Source.classes`.
        split: the split it has in the data, or None where the data has none.
    """

    name: str
    label: int
    split: Split | None = None


@dataclass(frozen=True)
class Source:
    """Labelled pictures in one order: by name, whatever the order of files or rows.

    Args:
        where: where they were found, for messages.
        classes: names of the classes, sorted.
        examples: the pictures, sorted by name.
        content: the bytes of a picture's file. Raises DataError.
        notes: what was passed over while looking, a sentence each.
        hashes: name to BLAKE2b of the bytes, as far as they have been read; see `check_pictures`.
        mirror: whether a mirrored picture is still one of its class; not so for digits.
        limits: how pictures are decoded.
    """

    where: str
    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    content: Callable[[Example], bytes] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    mirror: bool = True
    limits: PhotoLimits = LIMITS

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, example: Example) -> Image.Image:
        """The upright RGB picture. Safe in threads.

        Raises:
            DataError: it cannot be read, or its bytes are not those that were checked.
        """
        data = self.content(example)
        known = self.hashes.get(example.name)
        if known is not None and known != hash_of(data):
            raise DataError(
                f"{self.where}: {example.name} has changed since it was checked. Keep pictures as they are during a run.",
                file=example.name,
                given="changed",
            )
        return decode(data, example.name, self.limits, remarks=False).rgb

    @cached_property
    def digest(self) -> str:
        """A digest of classes, names, labels and splits; of the bytes nothing."""
        rows = (f"{each.name}\n{each.label}\n{each.split}" for each in self.examples)
        return cache_key(len(self.classes), *self.classes, *rows)

    @property
    def has_splits(self) -> bool:
        """Whether the data says which pictures are for training."""
        return any(each.split is not None for each in self.examples)

    def counts(self, split: Split | None = None) -> dict[str, int]:
        """Pictures of each class, in one split or in all."""
        held = Counter(each.label for each in self.examples if split is None or each.split == split)
        return {name: held[label] for label, name in enumerate(self.classes)}

    def keeping(self, kept: Callable[[Example], bool]) -> "Source":
        """The examples that `kept` says yes to; classes left without any are dropped, and labels counted anew."""
        held = [each for each in self.examples if kept(each)]
        old = sorted({each.label for each in held})
        new = {label: place for place, label in enumerate(old)}
        examples = tuple(replace(each, label=new[each.label]) for each in held)
        return replace(self, classes=tuple(self.classes[label] for label in old), examples=examples)


class Row(NamedTuple):
    """What a reader found: a picture's name, the name of its class, and its split."""

    name: str
    label: str
    split: Split | None


def hash_of(data: bytes) -> str:
    """BLAKE2b of a file's bytes, 40 hex letters."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def assemble(where: str, rows: Iterable[Row], content: Callable[[Example], bytes], notes: Sequence[str] = ()) -> Source:
    """The source of some rows, in any order.

    Raises:
        DataError: no rows; one name twice; splits of which none is for training.
    """
    found = sorted(rows, key=lambda row: row.name)
    if not found:
        message = f"{where}: no pictures with a class; expected at least two classes of pictures. See find_pictures."
        raise DataError(message, file=where, where="classes", given=0)
    twice = [name for name, times in Counter(row.name for row in found).items() if times > 1]
    if twice:
        message = f"{where}: {some(twice)} listed more than once; expected each picture once. Remove the other lines."
        raise DataError(message, file=where, where="copies", given=tuple(twice))
    held = {row.split for row in found}
    if held != {None} and "train" not in held:
        splits = sorted(map(str, held))
        message = f"{where}: splits {some(splits)} and none for training; expected one called train."
        raise DataError(message, file=where, where="splits", given=tuple(splits), expected="train")
    classes = tuple(sorted({row.label for row in found}))
    place = {name: label for label, name in enumerate(classes)}
    return Source(where, classes, tuple(Example(r.name, place[r.label], r.split) for r in found), content, tuple(notes))


def some(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence; of many the first, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
