"""Training, validation and test splits, determined by names, labels and a seed only.

Images of a class are ordered by `mix(seed, name)`, independent of the order of files and of other classes. The test split is
taken first, then validation, then shots. Runs with fewer shots therefore have the same test split, and their training images are
a subset of those of runs with more shots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from veneer.training.data.image_io import DataError
from veneer.training.data.latent_cache import cache_key
from veneer.training.loop.seeds import mix

from .labeled_images import Source, Split, hash_of, some
from .multi_label.stratification import stratify

_Copies = list[int]  # indices in source.examples of images with the same bytes


@dataclass(frozen=True)
class Splits:
    """Indices in `source.examples`, in order, of each split.

    Args:
        train, validation, test: disjoint; validation and test may be empty if their fraction is 0.
        seed: of the split.
        shots: training images per class; None means all.
        made: the splits that were not part of the data.
        notes: sentences on problems: the same image in two splits, classes with too few images.
        digest: hash of the images' names, labels and bytes in each split.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    seed: int
    shots: int | None
    made: tuple[Split, ...]
    notes: tuple[str, ...]
    digest: str


def split(source: Source, seed: int, *, validation: float = 0.1, test: float = 0.15, shots: int | None = None) -> Splits:
    """Splits a source into train, validation and test, stratified by class; images with several labels by `stratify`.

    The data's own splits are kept; a missing split is taken from train. Copies of an image go to the same split. A class of n
    images contributes `round(n * fraction)` images, at least one, to each created split, as long as one training image remains:
    of two images one goes to train and one to test, a single image goes to train.

    Args:
        seed: of the split.
        validation, test: fractions of the images outside the data's own splits, together less than 1. 0 creates no split.
        shots: N training images per class, without copies, and `min(N, 4)` validation images per class (CoOp's convention), also
            from the data's own validation split, because few-shot data has few validation labels too. The test split stays whole.

    Raises:
        DataError: a fraction or a number out of range; an unreadable image, if hashes are missing.

    Source: K. Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, section 4.1, for shots.
    """
    _check_options(validation, test, shots)
    hashes = hashes_of(source)
    members: dict[Split, set[int]] = {"train": set(), "validation": set(), "test": set()}
    for index, example in enumerate(source.examples):
        members[example.split or "train"].add(index)
    notes = list(_leaks(source, hashes, members))
    fractions: dict[Split, float] = {"test": test, "validation": validation}
    made: tuple[Split, ...] = tuple(name for name, fraction in fractions.items() if fraction and not members[name])
    shares = {name: fractions[name] for name in made}
    if source.multi_label:
        notes += _stratify(source, hashes, members, seed, shares)
    else:
        for label, groups in _groups(source, hashes, members["train"], seed).items():
            notes += _split_class(source.classes[label], groups, members, shares)
    if shots is not None:
        notes += _limit_shots(source, hashes, members, seed, shots)
    train, val, tested = (tuple(sorted(members[name])) for name in ("train", "validation", "test"))
    return Splits(train, val, tested, seed, shots, made, tuple(notes), digest_of(source, hashes, (train, val, tested)))


def limit_shots(source: Source, splits: Splits, shots: int, seed: int) -> Splits:
    """The splits with N training and min(N, 4) validation images per class, as by `shots` of `split`, and the same test split.

    Args:
        shots: N. `seed`: orders the images of each class; with one seed, fewer shots are a subset of more.

    Raises:
        DataError: a number out of range; images with several labels; an unreadable image, if hashes are missing.
    """
    _check_options(0, 0, shots)
    hashes = hashes_of(source)
    members: dict[Split, set[int]] = {
        "train": set(splits.train), "validation": set(splits.validation), "test": set(splits.test)
    }  # fmt: skip
    notes = tuple(_limit_shots(source, hashes, members, seed, shots))
    train, validation = (tuple(sorted(members[name])) for name in ("train", "validation"))
    digest = digest_of(source, hashes, (train, validation, splits.test))
    return dataclasses.replace(splits, train=train, validation=validation, shots=shots, notes=notes, digest=digest)


def hashes_of(source: Source) -> list[str]:
    """BLAKE2b of each image's bytes, in the order of the examples; computed if `check_images` has not."""
    return [source.hashes.get(each.name) or hash_of(source.content(each)) for each in source.examples]


def digest_of(source: Source, hashes: Sequence[str], splits: Sequence[Sequence[int]]) -> str:
    """Hash of splits; see `Splits.digest`."""
    rows = ((source.examples[i].name, source.label_text(source.examples[i]), hashes[i]) for indices in splits for i in indices)
    return cache_key(*map(len, splits), *(field for row in rows for field in row))


def _groups(source: Source, hashes: Sequence[str], indices: set[int], seed: int) -> dict[int, list[_Copies]]:
    """The images of each class, grouped into copies, in seeded order. Copies with several labels count for the first label."""
    copies: dict[str, _Copies] = {}
    for index in sorted(indices):
        copies.setdefault(hashes[index], []).append(index)
    groups: dict[int, list[_Copies]] = {}
    for group in copies.values():
        groups.setdefault(source.examples[group[0]].label, []).append(group)
    for of_class in groups.values():
        of_class.sort(key=lambda group: mix(seed, source.examples[group[0]].name))
    return dict(sorted(groups.items()))


def _stratify(
    source: Source, hashes: Sequence[str], members: dict[Split, set[int]], seed: int, shares: dict[Split, float]
) -> Iterator[str]:
    """Moves images with several labels from train to the created splits. Yields notes."""
    copies: dict[str, _Copies] = {}
    for index in sorted(members["train"], key=lambda each: mix(seed, source.examples[each].name)):
        copies.setdefault(hashes[index], []).append(index)
    groups = list(copies.values())
    labels = [sorted({label for index in group for label in source.examples[index].labels}) for group in groups]
    for group, number in zip(groups, stratify(labels, [*shares.values()]), strict=True):
        if number is not None:
            _move(group, groups[:], members, [*shares][number])
    for name in shares:
        present = {label for index in members[name] for label in source.examples[index].labels}
        absent = [each for label, each in enumerate(source.classes) if label not in present]
        if absent:
            yield f"too few images of {some(absent)} for the {name} split; the labels are missing there."


def _split_class(
    name: str, groups: list[_Copies], members: dict[Split, set[int]], fractions: dict[Split, float]
) -> Iterator[str]:
    """Moves the fraction of each split from train, in order; at least one group stays in train. Yields notes."""
    total = sum(map(len, groups))
    remaining = list(groups)
    for split_name, fraction in fractions.items():
        target = max(1, round(total * fraction))
        moved = 0
        for group in list(remaining):
            if len(remaining) > 1 and moved + len(group) <= target:
                moved += _move(group, remaining, members, split_name)
        if not moved and len(remaining) > 1:  # all groups of copies are larger than the target
            moved = _move(min(remaining, key=len), remaining, members, split_name)
        if not moved:
            yield f"{name}: too few images ({total}) for the {split_name} split; the class is missing there."


def _move(group: _Copies, remaining: list[_Copies], members: dict[Split, set[int]], split_name: Split) -> int:
    remaining.remove(group)
    members["train"].difference_update(group)
    members[split_name].update(group)
    return len(group)


def _limit_shots(source: Source, hashes: Sequence[str], members: dict[Split, set[int]], seed: int, shots: int) -> Iterator[str]:
    """Reduces train to `shots` and validation to `min(shots, 4)` images per class. Yields notes."""
    if source.multi_label:
        message = "split: shots counts the images of one class each, but images have several labels. Leave out shots."
        raise DataError(message, where="shots", given=shots, expected=None)
    limits: tuple[tuple[Split, int], ...] = (("train", shots), ("validation", min(shots, 4)))
    for split_name, limit in limits:
        groups = _groups(source, hashes, members[split_name], seed)
        if split_name == "train":
            counts = {name: len(groups.get(label, ())) for label, name in enumerate(source.classes)}
            small = [f"{name} ({count})" for name, count in counts.items() if count < limit]
            if small:
                yield f"fewer than {limit} different training images in {some(small)}; all of them are used."
        members[split_name] = {group[0] for each in groups.values() for group in each[:limit]}


def _leaks(source: Source, hashes: Sequence[str], members: dict[Split, set[int]]) -> Iterator[str]:
    """Notes on copies across the data's own splits, and on copies with two labels."""
    split_of = {index: name for name, indices in members.items() for index in indices}
    copies: dict[str, _Copies] = {}
    for index, value in enumerate(hashes):
        copies.setdefault(value, []).append(index)
    duplicates = [group for group in copies.values() if len(group) > 1]
    pairs: tuple[tuple[Split, Split, str], ...] = (
        ("train", "test", "the test accuracy will be too high"),
        ("validation", "test", "the test images are not entirely unseen"),
        ("train", "validation", "the validation accuracy, which selects the epoch, will be too high"),
    )
    for one, other, effect in pairs:
        shared = [group for group in duplicates if {one, other} <= {split_of[index] for index in group}]
        if shared:
            yield f"{len(shared):,} images are in both {one} and {other}: {effect}. Remove the copies: {_names(source, shared)}."
    conflicting = [group for group in duplicates if len({source.examples[index].labels for index in group}) > 1]
    if conflicting:
        yield f"{len(conflicting):,} images have two classes. Remove the wrong copies: {_names(source, conflicting)}."


def _names(source: Source, groups: Sequence[_Copies]) -> str:
    return some([" = ".join(source.examples[index].name for index in group) for group in groups], 4)


def _check_options(validation: float, test: float, shots: int | None) -> None:
    for name, fraction in (("validation", validation), ("test", test)):
        if not 0 <= fraction < 1:
            message = f"split: {name} is {fraction}; expected a fraction from 0 to less than 1, such as 0.1."
            raise DataError(message, where=name, given=fraction)
    if validation + test >= 1:
        raise DataError(
            f"split: validation {validation} and test {test} leave no training images; expected a sum below 1.",
            where="train",
            given=(validation, test),
        )
    if shots is not None and shots < 1:
        message = f"split: shots is {shots}; expected at least 1, or None for all images."
        raise DataError(message, where="shots", given=shots, expected=1)
