"""Dealing pictures: stratified, repeatable, whatever the data brings is kept, copies stay together."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from tests.raising import carries, raises
from tests.training.pictures import DATA, save
from veneer.classification.data.labeled_images import Row, assemble
from veneer.classification.data.sources import find_pictures
from veneer.classification.data.split_files import load_splits, save_splits
from veneer.classification.data.splits import split
from veneer.training.data.image_io import DataError

CLOTHING = DATA / "clothing-160"


def source(counts, splits=(None,), content=None):
    """Pictures without pixels: the bytes are the name, unless said otherwise; `counts` of each class in each split."""
    rows = [Row(f"{word}/{name}/{n:03d}", name, word) for word in splits for name, held in counts.items() for n in range(held)]
    known = content or {}
    return assemble("here", rows, lambda each: known.get(each.name, each.name).encode())


def names(of, places):
    return {of.examples[place].name for place in places}


def held(of, places):
    return Counter(of.classes[of.examples[place].label] for place in places)


def test_each_class_gives_its_share():
    pictures = source({"a": 100, "b": 40, "c": 7})
    splits = split(pictures, 0)
    assert held(pictures, splits.test) == {"a": 15, "b": 6, "c": 1}
    assert held(pictures, splits.validation) == {"a": 10, "b": 4, "c": 1}
    assert sorted([*splits.train, *splits.validation, *splits.test]) == list(range(147))
    assert splits.made == ("test", "validation")
    assert splits.notes == ()


def test_the_deal_depends_on_names_labels_and_seed_only():
    pictures = source({"a": 100, "b": 40})
    backwards = assemble(
        "elsewhere", [Row(e.name, pictures.classes[e.label], None) for e in pictures.examples[::-1]], pictures.content
    )
    assert split(pictures, 3) == split(backwards, 3)
    assert split(pictures, 3).test != split(pictures, 4).test
    assert split(pictures, 3).digest != split(pictures, 4).digest
    alone = source({"a": 100})
    assert names(alone, split(alone, 3).test) == {name for name in names(pictures, split(pictures, 3).test) if "/a/" in name}


def test_a_deal_is_even_over_seeds():
    pictures = source({"a": 20})
    times = Counter(place for seed in range(400) for place in split(pictures, seed, test=0.25, validation=0).test)
    assert all(60 <= times[place] <= 140 for place in range(20))  # 100 expected, a deviation of 8.7


@pytest.mark.parametrize(("own", "made"), [(("train", "test"), "validation"), (("train", "validation"), "test")])
def test_only_a_missing_split_is_made(own, made):
    pictures = source({"a": 20, "b": 10}, own)
    splits = split(pictures, 0, validation=0.2, test=0.2)
    kept = own[1]
    assert names(pictures, getattr(splits, kept)) == {e.name for e in pictures.examples if e.split == kept}
    assert held(pictures, getattr(splits, made)) == {"a": 4, "b": 2}
    assert held(pictures, splits.train) == {"a": 16, "b": 8}
    assert splits.made == (made,)


def test_own_splits_are_kept_whatever_the_shares():
    pictures = source({"a": 3, "b": 5}, ("train", "validation", "test"))
    splits = split(pictures, 0, validation=0.5, test=0.3)
    assert splits.made == ()
    for word in ("train", "validation", "test"):
        assert names(pictures, getattr(splits, word)) == {e.name for e in pictures.examples if e.split == word}


def test_a_share_of_nothing_makes_no_split():
    splits = split(source({"a": 10, "b": 10}), 0, validation=0, test=0)
    assert (len(splits.train), splits.validation, splits.test, splits.made) == (20, (), (), ())


def test_small_classes():
    pictures = source({"one": 1, "two": 2, "three": 3})
    splits = split(pictures, 0)
    assert held(pictures, splits.train) == {"one": 1, "two": 1, "three": 1}
    assert held(pictures, splits.test) == {"two": 1, "three": 1}
    assert held(pictures, splits.validation) == {"three": 1}
    assert set(splits.notes) == {
        "one: too few pictures for test (1 in all); the class is not in it.",
        "one: too few pictures for validation (1 in all); the class is not in it.",
        "two: too few pictures for validation (2 in all); the class is not in it.",
    }


def test_copies_stay_together():
    """Pictures 0, 7, 14, … of 70 are one picture, and 1, 8 of another class another."""
    same = {f"None/a/{n:03d}": "heap" for n in range(0, 70, 7)} | {"None/b/001": "pair", "None/b/008": "pair"}
    pictures = source({"a": 70, "b": 20}, content=same)
    placed = set()
    for seed in range(30):
        splits = split(pictures, seed)
        for heap in ("heap", "pair"):
            members = {name for name, value in same.items() if value == heap}
            inside = [word for word in ("train", "validation", "test") if members <= names(pictures, getattr(splits, word))]
            assert len(inside) == 1
            placed.update((heap, word) for word in inside)
        assert held(pictures, splits.test) == {"a": 10, "b": 3}
    assert {("heap", "train"), ("pair", "train"), ("pair", "test")} <= placed


def test_copies_in_several_splits_are_named():
    same = {
        "train/a/000": "x",
        "test/a/001": "x",
        "validation/b/000": "y",
        "test/b/001": "y",
        "train/b/003": "z",
        "train/a/002": "z",
    }
    notes = split(source({"a": 4, "b": 4}, ("train", "validation", "test"), same), 0).notes
    assert notes[0].startswith("1 pictures are in train and in test, so the test result will be too good")
    assert "test/a/001 = train/a/000" in notes[0]
    assert "test/b/001 = validation/b/000" in notes[1]
    assert notes[2].startswith("1 pictures are there under two classes")
    assert "train/a/002 = train/b/003" in notes[2]
    assert len(notes) == 3


def test_shots():
    pictures = source({"a": 60, "b": 40, "c": 4})
    whole = split(pictures, 1)
    before = set()
    for shots in (1, 2, 4, 8, 16):
        splits = split(pictures, 1, shots=shots)
        assert splits.test == whole.test
        assert set(splits.train) <= set(whole.train)
        assert set(splits.validation) <= set(whole.validation)
        assert held(pictures, splits.train) == {"a": shots, "b": shots, "c": min(shots, 2)}
        assert held(pictures, splits.validation) == {
            name: min(shots, 4, held(pictures, whole.validation)[name]) for name in "abc"
        }
        assert before <= set(splits.train)
        before = set(splits.train)
    assert splits.notes == ("fewer than 16 different pictures to train on in c (2); all of them are used.",)


def test_shots_of_the_datas_own_validation():
    pictures = source({"a": 20, "b": 20}, ("train", "validation", "test"))
    splits = split(pictures, 0, shots=8)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 8, 40)


def test_a_copy_is_no_second_shot():
    pictures = source({"a": 20, "b": 20}, content={f"None/a/{n:03d}": "same" for n in range(0, 20, 2)})
    splits = split(pictures, 0, shots=8, validation=0, test=0)
    of_a = names(pictures, splits.train) & {e.name for e in pictures.examples if "/a/" in e.name}
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
def test_wrong_options(options, where, given):
    with raises(DataError, where=where, given=given):
        split(source({"a": 5, "b": 5}), 0, **options)


@pytest.mark.parametrize("shots", [None, 4])
def test_a_file_gives_the_same_splits(tmp_path, shots):
    pictures = source({"a": 20, "ü": 10})
    splits = split(pictures, 5, shots=shots)
    save_splits(splits, pictures, tmp_path / "run" / "splits.json")
    assert load_splits(tmp_path / "run" / "splits.json", pictures) == splits
    table = json.loads((tmp_path / "run" / "splits.json").read_text(encoding="utf-8"))
    assert {name for name, _, _ in table["test"]} == names(pictures, splits.test)
    assert (table["seed"], table["classes"]) == (5, ["a", "ü"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["splits.json"]


def test_a_file_of_other_pictures(tmp_path):
    pictures, path = source({"a": 20, "b": 10}), tmp_path / "splits.json"
    splits = split(pictures, 5)
    save_splits(splits, pictures, path)
    gone = pictures.keeping(lambda each: each.name != "None/a/003")
    with raises(DataError, file=path, where="pictures") as caught:
        load_splits(path, gone)
    carries(*caught.value.given, where="None/a/003", given="missing")
    other = replace(pictures, content=lambda each: b"new" if each.name == "None/b/001" else each.name.encode())
    with raises(DataError, file=path, where="pictures") as caught:
        load_splits(path, other)
    carries(*caught.value.given, where="None/b/001", given="changed")
    moved = replace(pictures, examples=tuple(replace(e, label=1) if e.name == "None/a/004" else e for e in pictures.examples))
    with raises(DataError, file=path, where="pictures") as caught:
        load_splits(path, moved)
    carries(*caught.value.given, where="None/a/004", given="b", expected="a")
    with raises(DataError, file=path, where="classes", given=("a",), expected=("a", "b")):
        load_splits(path, source({"a": 20}))
    more = source({"a": 22, "b": 10})
    again = load_splits(path, more)
    assert names(more, again.train) == names(pictures, splits.train)
    assert "had 2 pictures fewer; those are not used" in again.notes[-1]


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
def test_a_broken_file(tmp_path, change, where, given):
    pictures, path = source({"a": 20, "b": 10}), tmp_path / "splits.json"
    save_splits(split(pictures, 5), pictures, path)
    path.write_text(change(json.loads(path.read_text())))
    with raises(DataError, file=path, where=where, given=given):
        load_splits(path, pictures)
    with raises(DataError, file=tmp_path / "none.json", given="unreadable"):
        load_splits(tmp_path / "none.json", pictures)


def test_real_files_with_a_leak(tmp_path):
    for word in ("train", "test"):
        for seed, name in enumerate("ab"):
            for number in range(3):
                save(tmp_path / word / name / f"{number}.png", 20, 16, seed=100 * (word == "test") + 10 * seed + number)
    leaked = tmp_path / "test" / "a" / "0.png"
    leaked.write_bytes((tmp_path / "train" / "a" / "2.png").read_bytes())
    notes = split(find_pictures(tmp_path), 0).notes
    assert [note for note in notes if "train and in test" in note and "test/a/0.png = train/a/2.png" in note]


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="../shared/data/clothing-160 is not there")
def test_the_clothing_photos():
    splits = split(find_pictures(CLOTHING), 0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3068, 341, 372)
    assert splits.made == ()
