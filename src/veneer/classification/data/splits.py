"""Which pictures train, which choose the epoch, which are kept for the test: drawn from names, labels and a seed alone.

A picture's rank in its class is `mix(seed, name)`: no order of files and no other class has a part in it. The test is dealt
first, then the validation, then shots. Runs with fewer shots therefore have the same test, and their training pictures are among
those of runs with more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from veneer.training.data.image_io import DataError
from veneer.training.data.latent_cache import cache_key
from veneer.training.loop.seeds import mix

from .labeled_images import Source, Split, hash_of, some

_Copies = list[int]  # pictures with the same bytes, as places in source.examples


@dataclass(frozen=True)
class Splits:
    """Places in `source.examples`, in order, of each split.

    Args:
        train, validation, test: disjoint; validation and test may be empty if shares of 0 were asked for.
        seed: that dealt them.
        shots: pictures of each class in train, or None for all.
        made: the splits that the data did not have.
        notes: what looks wrong, a sentence each: the same picture in two splits, classes with too few pictures.
        digest: of the pictures' names, labels and bytes in each split.
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
    """Deal a source's pictures to train, validation and test, class by class.

    Splits that the data has are kept as they are; a missing one is taken from train. Copies of one picture go to one split
    together. A class of n pictures gives `round(n * share)` of them, at least one, to each split that is made, as long as one is
    left to train: of two pictures one trains and one tests, a single one trains.

    Args:
        seed: of the deal.
        validation, test: shares of the pictures that may train, 0 up to less than 1 together. 0 makes no such split.
        shots: N pictures of each class train, no two of them copies, and `min(N, 4)` choose the epoch (CoOp's convention), also
            of the data's own validation: who has few labels for training has few for choosing. The test stays whole.

    Raises:
        DataError: a share or a number out of range; a picture that cannot be read, where hashes are missing.

    Source: K. Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, section 4.1, for shots.
    """
    _check_options(validation, test, shots)
    hashes = hashes_of(source)
    held: dict[Split, set[int]] = {"train": set(), "validation": set(), "test": set()}
    for place, example in enumerate(source.examples):
        held[example.split or "train"].add(place)
    notes = list(_leaks(source, hashes, held))
    shares: dict[Split, float] = {"test": test, "validation": validation}
    made: tuple[Split, ...] = tuple(name for name, share in shares.items() if share and not held[name])
    for label, groups in _groups(source, hashes, held["train"], seed).items():
        notes += _deal(source.classes[label], groups, held, {name: shares[name] for name in made})
    if shots is not None:
        notes += _few(source, hashes, held, seed, shots)
    train, chosen, kept = (tuple(sorted(held[name])) for name in ("train", "validation", "test"))
    return Splits(train, chosen, kept, seed, shots, made, tuple(notes), digest_of(source, hashes, (train, chosen, kept)))


def hashes_of(source: Source) -> list[str]:
    """BLAKE2b of each picture's bytes, in the order of the examples; read where the check has not."""
    return [source.hashes.get(each.name) or hash_of(source.content(each)) for each in source.examples]


def digest_of(source: Source, hashes: Sequence[str], splits: Sequence[Sequence[int]]) -> str:
    """See `Splits.digest`."""
    rows = ((source.examples[i].name, source.classes[source.examples[i].label], hashes[i]) for held in splits for i in held)
    return cache_key(*map(len, splits), *(word for row in rows for word in row))


def _groups(source: Source, hashes: Sequence[str], places: set[int], seed: int) -> dict[int, list[_Copies]]:
    """The pictures of each class, copies together, in the order in which they are dealt. Copies under several labels are dealt
    with the class of the first."""
    copies: dict[str, _Copies] = {}
    for place in sorted(places):
        copies.setdefault(hashes[place], []).append(place)
    groups: dict[int, list[_Copies]] = {}
    for group in copies.values():
        groups.setdefault(source.examples[group[0]].label, []).append(group)
    for held in groups.values():
        held.sort(key=lambda group: mix(seed, source.examples[group[0]].name))
    return dict(sorted(groups.items()))


def _deal(name: str, groups: list[_Copies], held: dict[Split, set[int]], shares: dict[Split, float]) -> Iterator[str]:
    """Take from train, in order, what each split of `shares` is due; the last group always trains."""
    total = sum(map(len, groups))
    left = list(groups)
    for word, share in shares.items():
        due = max(1, round(total * share))
        taken = 0
        for group in list(left):
            if len(left) > 1 and taken + len(group) <= due:
                taken += _move(group, left, held, word)
        if not taken and len(left) > 1:  # nothing but copies in larger heaps
            taken = _move(min(left, key=len), left, held, word)
        if not taken:
            yield f"{name}: too few pictures for {word} ({total} in all); the class is not in it."


def _move(group: _Copies, left: list[_Copies], held: dict[Split, set[int]], word: Split) -> int:
    left.remove(group)
    held["train"].difference_update(group)
    held[word].update(group)
    return len(group)


def _few(source: Source, hashes: Sequence[str], held: dict[Split, set[int]], seed: int, shots: int) -> Iterator[str]:
    words: tuple[tuple[Split, int], ...] = (("train", shots), ("validation", min(shots, 4)))
    for word, most in words:
        groups = _groups(source, hashes, held[word], seed)
        if word == "train":
            short = [
                f"{name} ({len(groups.get(at, ()))})" for at, name in enumerate(source.classes) if len(groups.get(at, ())) < most
            ]
            if short:
                yield f"fewer than {most} different pictures to train on in {some(short)}; all of them are used."
        held[word] = {group[0] for each in groups.values() for group in each[:most]}


def _leaks(source: Source, hashes: Sequence[str], held: dict[Split, set[int]]) -> Iterator[str]:
    """Copies across the data's own splits, and copies under two labels."""
    where = {place: word for word, places in held.items() for place in places}
    copies: dict[str, _Copies] = {}
    for place, value in enumerate(hashes):
        copies.setdefault(value, []).append(place)
    several = [group for group in copies.values() if len(group) > 1]
    pairs: tuple[tuple[Split, Split, str], ...] = (
        ("train", "test", "the test result will be too good"),
        ("validation", "test", "the test is not quite unseen"),
        ("train", "validation", "the choice of the epoch will be too sure"),
    )
    for one, other, harm in pairs:
        both = [group for group in several if {one, other} <= {where[place] for place in group}]
        if both:
            yield f"{len(both):,} pictures are in {one} and in {other}, so {harm}; remove a copy: {_spelt(source, both)}."
    torn = [group for group in several if len({source.examples[place].label for place in group}) > 1]
    if torn:
        yield f"{len(torn):,} pictures are there under two classes; remove the wrong copy: {_spelt(source, torn)}."


def _spelt(source: Source, groups: Sequence[_Copies]) -> str:
    return some([" = ".join(source.examples[place].name for place in group) for group in groups], 4)


def _check_options(validation: float, test: float, shots: int | None) -> None:
    for word, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            message = f"split: {word} is {share}; expected a share from 0 to less than 1, such as 0.1."
            raise DataError(message, where=word, given=share)
    if validation + test >= 1:
        raise DataError(
            f"split: validation {validation} and test {test} leave nothing to train on; expected less than 1 together.",
            where="train",
            given=(validation, test),
        )
    if shots is not None and shots < 1:
        message = f"split: shots is {shots}; expected at least 1, or None for all images."
        raise DataError(message, where="shots", given=shots, expected=1)
