"""Splits: stratified, reproducible, existing splits are kept, copies stay together."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from tests.raising import carries, raises
from tests.training.images import DATA, save
from veneer.classification.data.labeled_images import LabeledRow, assemble
from veneer.classification.data.sources import open_source
from veneer.classification.data.split_files import load_splits, save_splits
from veneer.classification.data.splits import split
from veneer.training.data.image_io import DataError

CLOTHING = DATA / "clothing-160"


def source(counts, splits=(None,), content=None):
    """A source with `counts` of each class in each split, whose bytes are `content` or the name."""
    rows = [
        LabeledRow(f"{word}/{name}/{n:03d}", name, word)
        for word in splits
        for name, count in counts.items()
        for n in range(count)
    ]
    known = content or {}
    return assemble("here", rows, lambda each: known.get(each.name, each.name).encode())


def names(of, places):
    return {of.examples[place].name for place in places}


def count_classes(of, places):
    return Counter(of.classes[of.examples[place].label] for place in places)


def test_splits_are_stratified():
    images = source({"a": 100, "b": 40, "c": 7})
    splits = split(images, 0)
    assert count_classes(images, splits.test) == {"a": 15, "b": 6, "c": 1}
    assert count_classes(images, splits.validation) == {"a": 10, "b": 4, "c": 1}
    assert sorted([*splits.train, *splits.validation, *splits.test]) == list(range(147))
    assert splits.made == ("test", "validation")
    assert splits.notes == ()


def test_split_depends_on_names_labels_and_seed_only():
    images = source({"a": 100, "b": 40})
    backwards = assemble(
        "elsewhere", [LabeledRow(e.name, images.classes[e.label], None) for e in images.examples[::-1]], images.content
    )
    assert split(images, 3) == split(backwards, 3)
    assert split(images, 3).test != split(images, 4).test
    assert split(images, 3).digest != split(images, 4).digest
    alone = source({"a": 100})
    assert names(alone, split(alone, 3).test) == {name for name in names(images, split(images, 3).test) if "/a/" in name}


def test_split_is_uniform_over_seeds():
    images = source({"a": 20})
    times = Counter(place for seed in range(400) for place in split(images, seed, test=0.25, validation=0).test)
    assert all(60 <= times[place] <= 140 for place in range(20))  # 100 expected, a deviation of 8.7


@pytest.mark.parametrize(("own", "made"), [(("train", "test"), "validation"), (("train", "validation"), "test")])
def test_only_missing_splits_are_created(own, made):
    images = source({"a": 20, "b": 10}, own)
    splits = split(images, 0, validation=0.2, test=0.2)
    kept = own[1]
    assert names(images, getattr(splits, kept)) == {e.name for e in images.examples if e.split == kept}
    assert count_classes(images, getattr(splits, made)) == {"a": 4, "b": 2}
    assert count_classes(images, splits.train) == {"a": 16, "b": 8}
    assert splits.made == (made,)


def test_existing_splits_are_kept():
    images = source({"a": 3, "b": 5}, ("train", "validation", "test"))
    splits = split(images, 0, validation=0.5, test=0.3)
    assert splits.made == ()
    for word in ("train", "validation", "test"):
        assert names(images, getattr(splits, word)) == {e.name for e in images.examples if e.split == word}


def test_fraction_zero_creates_no_split():
    splits = split(source({"a": 10, "b": 10}), 0, validation=0, test=0)
    assert (len(splits.train), splits.validation, splits.test, splits.made) == (20, (), (), ())


def test_small_classes():
    images = source({"one": 1, "two": 2, "three": 3})
    splits = split(images, 0)
    assert count_classes(images, splits.train) == {"one": 1, "two": 1, "three": 1}
    assert count_classes(images, splits.test) == {"two": 1, "three": 1}
    assert count_classes(images, splits.validation) == {"three": 1}
    assert set(splits.notes) == {
        "one: too few images (1) for the test split; the class is missing there.",
        "one: too few images (1) for the validation split; the class is missing there.",
        "two: too few images (2) for the validation split; the class is missing there.",
    }


def test_copies_stay_together():
    """Images 0, 7, 14, … of 70 are copies, and so are 1 and 8 of another class."""
    same = {f"None/a/{n:03d}": "heap" for n in range(0, 70, 7)} | {"None/b/001": "pair", "None/b/008": "pair"}
    images = source({"a": 70, "b": 20}, content=same)
    placed = set()
    for seed in range(30):
        splits = split(images, seed)
        for heap in ("heap", "pair"):
            members = {name for name, value in same.items() if value == heap}
            inside = [word for word in ("train", "validation", "test") if members <= names(images, getattr(splits, word))]
            assert len(inside) == 1
            placed.update((heap, word) for word in inside)
        assert count_classes(images, splits.test) == {"a": 10, "b": 3}
    assert {("heap", "train"), ("pair", "train"), ("pair", "test")} <= placed


def test_copies_in_several_splits_are_noted():
    same = {
        "train/a/000": "x",
        "test/a/001": "x",
        "validation/b/000": "y",
        "test/b/001": "y",
        "train/b/003": "z",
        "train/a/002": "z",
    }
    notes = split(source({"a": 4, "b": 4}, ("train", "validation", "test"), same), 0).notes
    assert notes[0].startswith("1 images are in both train and test: the test accuracy will be too high")
    assert "test/a/001 = train/a/000" in notes[0]
    assert "test/b/001 = validation/b/000" in notes[1]
    assert notes[2].startswith("1 images have two classes")
    assert "train/a/002 = train/b/003" in notes[2]
    assert len(notes) == 3


def test_shots():
    images = source({"a": 60, "b": 40, "c": 4})
    whole = split(images, 1)
    before = set()
    for shots in (1, 2, 4, 8, 16):
        splits = split(images, 1, shots=shots)
        assert splits.test == whole.test
        assert set(splits.train) <= set(whole.train)
        assert set(splits.validation) <= set(whole.validation)
        assert count_classes(images, splits.train) == {"a": shots, "b": shots, "c": min(shots, 2)}
        assert count_classes(images, splits.validation) == {
            name: min(shots, 4, count_classes(images, whole.validation)[name]) for name in "abc"
        }
        assert before <= set(splits.train)
        before = set(splits.train)
    assert splits.notes == ("fewer than 16 different training images in c (2); all of them are used.",)


def test_shots_limit_an_existing_validation_split():
    images = source({"a": 20, "b": 20}, ("train", "validation", "test"))
    splits = split(images, 0, shots=8)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 8, 40)


def test_copies_count_as_one_shot():
    images = source({"a": 20, "b": 20}, content={f"None/a/{n:03d}": "same" for n in range(0, 20, 2)})
    splits = split(images, 0, shots=8, validation=0, test=0)
    of_a = names(images, splits.train) & {e.name for e in images.examples if "/a/" in e.name}
    assert len(of_a) == 8
    assert sum(int(name[-3:]) % 2 == 0 for name in of_a) <= 1


@pytest.mark.parametrize(
    ("options", "where", "given"),
    [
        ({"validation": 1.0}, "validation", 1.0),
        ({"test": -0.1}, "test", -0.1),
        ({"validation": 0.5, "test": 0.5}, "train", (0.5, 0.5)),
        ({"shots": 0}, "shots", 0),
    ],
)
def test_invalid_options(options, where, given):
    with raises(DataError, where=where, given=given):
        split(source({"a": 5, "b": 5}), 0, **options)


@pytest.mark.parametrize("shots", [None, 4])
def test_splits_file_round_trip(tmp_path, shots):
    images = source({"a": 20, "ü": 10})
    splits = split(images, 5, shots=shots)
    save_splits(splits, images, tmp_path / "run" / "splits.json")
    assert load_splits(tmp_path / "run" / "splits.json", images) == splits
    table = json.loads((tmp_path / "run" / "splits.json").read_text(encoding="utf-8"))
    assert {name for name, _, _ in table["test"]} == names(images, splits.test)
    assert (table["seed"], table["classes"]) == (5, ["a", "ü"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["splits.json"]


def test_splits_file_of_changed_data(tmp_path):
    images, path = source({"a": 20, "b": 10}), tmp_path / "splits.json"
    splits = split(images, 5)
    save_splits(splits, images, path)
    gone = images.filter(lambda each: each.name != "None/a/003")
    with raises(DataError, file=path, where="pictures") as caught:
        load_splits(path, gone)
    carries(*caught.value.given, where="None/a/003", given="missing")
    other = replace(images, content=lambda each: b"new" if each.name == "None/b/001" else each.name.encode())
    with raises(DataError, file=path, where="pictures") as caught:
        load_splits(path, other)
    carries(*caught.value.given, where="None/b/001", given="changed")
    moved = replace(images, examples=tuple(replace(e, label=1) if e.name == "None/a/004" else e for e in images.examples))
    with raises(DataError, file=path, where="pictures") as caught:
        load_splits(path, moved)
    carries(*caught.value.given, where="None/a/004", given="b", expected="a")
    with raises(DataError, file=path, where="classes", given=("a",), expected=("a", "b")):
        load_splits(path, source({"a": 20}))
    more = source({"a": 22, "b": 10})
    again = load_splits(path, more)
    assert names(more, again.train) == names(images, splits.train)
    assert "2 images were added to here since" in again.notes[-1]


@pytest.mark.parametrize(
    ("change", "where", "given"),
    [
        (lambda t: "{", None, "damaged"),
        (lambda t: "[]", None, "damaged"),
        (lambda t: json.dumps({**t, "form": 9}), "form", 9),
        (lambda t: json.dumps({**t, "test": t["test"][1:]}), "digest", None),
        (lambda t: json.dumps({k: v for k, v in t.items() if k != "seed"}), None, "damaged"),
    ],
)
def test_invalid_splits_file(tmp_path, change, where, given):
    images, path = source({"a": 20, "b": 10}), tmp_path / "splits.json"
    save_splits(split(images, 5), images, path)
    path.write_text(change(json.loads(path.read_text())))
    with raises(DataError, file=path, where=where, given=given):
        load_splits(path, images)
    with raises(DataError, file=tmp_path / "none.json", given="unreadable"):
        load_splits(tmp_path / "none.json", images)


def test_leak_between_train_and_test_files(tmp_path):
    for word in ("train", "test"):
        for seed, name in enumerate("ab"):
            for number in range(3):
                save(tmp_path / word / name / f"{number}.png", 20, 16, seed=100 * (word == "test") + 10 * seed + number)
    leaked = tmp_path / "test" / "a" / "0.png"
    leaked.write_bytes((tmp_path / "train" / "a" / "2.png").read_bytes())
    notes = split(open_source(tmp_path), 0).notes
    assert [note for note in notes if "both train and test" in note and "test/a/0.png = train/a/2.png" in note]


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="../shared/data/clothing-160 is not there")
def test_clothing_photos():
    splits = split(open_source(CLOTHING), 0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3068, 341, 372)
    assert splits.made == ()
