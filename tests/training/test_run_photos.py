"""Photos of a run: folders, metadata, held-out photos and checks; and batches of several datasets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.raising import raises, warns
from tests.training.images import save
from veneer.training.data.captions import Captions, expand_wildcards
from veneer.training.data.dataset import PhotoDataset, PhotoSource
from veneer.training.data.image_io import DataError, DataWarning
from veneer.training.data.photo_folder import find_photos
from veneer.training.data.run_photos import check_mentions, read_photos
from veneer.training.loop.seeds import generator
from veneer.training.personalization_config import PersonalizeConfig


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders `toys` with four images, `cups` with two and `bears` with three, of different content."""
    for start, (name, count) in enumerate({"toys": 4, "cups": 2, "bears": 3}.items()):
        for i in range(count):
            save(tmp_path / name / f"{i}.png", 64, 64, seed=10 * start + i)
    return tmp_path


def config(folder: Path, *tables: dict[str, Any], **settings: Any) -> PersonalizeConfig:
    placed = tuple({**table, "path": str(folder / table["path"])} for table in tables)
    return PersonalizeConfig(datasets=placed, **{"template": ("a {concept}",), **settings})


TOY, CUP = {"path": "toys", "concept": "<toy>"}, {"path": "cups", "concept": "<cup>"}


def dataset_of(run: PersonalizeConfig, resolution: int = 32) -> PhotoDataset:
    photos = read_photos(run)
    sources = [part.source(resolution) for part in photos.training]
    return PhotoDataset.from_sources(sources, 8, 5, prior=[part.source(resolution) for part in photos.regularization])


def test_photos_have_the_concept_of_their_dataset(folders: Path) -> None:
    photos = read_photos(config(folders, TOY, CUP, {"path": "bears", "class_word": "bear", "regularization": True}))
    assert Counter(photo.concept for photo in photos.photos) == {"<toy>": 4, "<cup>": 2}
    assert [photo.is_prior for photo in [photo for part in photos.regularization for photo in part.photos]] == [True] * 3
    assert len(photos.of_concept("<cup>")) == 2


def test_a_dataset_without_images_is_an_error(folders: Path) -> None:
    (folders / "empty").mkdir()
    with raises(DataError, file=folders / "empty", given=()):
        read_photos(config(folders, TOY, {"path": "empty", "concept": "<cup>"}))


def test_an_epoch_has_each_photo_as_often_as_its_repeats_and_resolutions(folders: Path) -> None:
    data = dataset_of(config(folders, {**TOY, "resolution": [32, 64]}, {**CUP, "repeats": 3}))
    assert len(data) == 4 * 2 + 2 * 3
    assert data.counts == {(32, 32): 4 + 2 * 3, (64, 64): 4}
    steps = [data.examples(step, 1)[0] for step in range(len(data))]
    assert Counter(e.caption for e in steps) == {"a <toy>": 8, "a <cup>": 6}
    assert Counter(e.pixels.shape[-1] for e in steps) == {32: 10, 64: 4}
    assert set(Counter(e.key for e in steps).values()) == {1, 3}


def test_datasets_have_their_own_captions_flips_and_masks(folders: Path) -> None:
    from PIL import Image

    for name in ("toys", "cups"):
        Image.new("L", (64, 64), 128).save(folders / name / "0.mask.png")
    data = dataset_of(config(folders, {**TOY, "caption_dropout": 1.0, "masks": False}, {**CUP, "flip": 1.0}))
    plain = dataset_of(config(folders, TOY, CUP))
    assert {plain.examples(step, 1)[0].caption for step in range(12)} == {"a <toy>", "a <cup>"}
    for step in range(12):
        (example,), (other,) = data.examples(step, 1), plain.examples(step, 1)
        if other.caption == "a <cup>":
            torch.testing.assert_close(example.pixels, other.pixels.flip(-1))
            assert (example.mask is None) == (other.mask is None)
        else:
            assert example.caption == ""
            assert example.mask is None
            assert torch.equal(example.pixels, other.pixels)


def test_an_example_depends_on_its_step_and_row_only(folders: Path) -> None:
    run = config(
        folders,
        {**TOY, "crop": "random", "shuffle_tags": True},
        CUP,
        {"path": "bears", "class_word": "bear", "regularization": True},
    )
    whole, parts = dataset_of(run), dataset_of(run)
    for step in (7, 0, 31):
        every, some = whole.examples(step, 4), parts.examples(step, 4, rows=[2, 3])
        for one, other in zip([every[2], every[3], every[6], every[7]], some, strict=True):
            assert (one.caption, one.key, one.index, one.is_prior) == (other.caption, other.key, other.index, other.is_prior)
            assert torch.equal(one.pixels, other.pixels)


def test_class_images_of_a_dataset_follow_the_photos(folders: Path) -> None:
    data = dataset_of(
        config(folders, TOY, {"path": "bears", "class_word": "bear", "regularization": True, "template": "one {concept}"})
    )
    examples = [example for step in range(3) for example in data.examples(step, 2)]
    assert [e.is_prior for e in examples] == [False, False, True, True] * 3
    assert {e.caption for e in examples if e.is_prior} == {"one bear"}
    assert len({e.key for e in examples if e.is_prior}) == 3


def test_class_images_without_a_class_word_are_an_error(folders: Path) -> None:
    with raises(DataError, where="captions", expected="prior"):
        dataset_of(config(folders, TOY, {"path": "bears", "regularization": True}))


def test_subfolders_are_read_if_recursive(tmp_path: Path) -> None:
    save(tmp_path / "a.png", seed=1)
    save(tmp_path / "deep" / "b.png", seed=2)
    save(tmp_path / "deep" / "masks" / "b.png", seed=2)
    save(tmp_path / ".trash" / "c.png", seed=3)
    (tmp_path / "deep" / "b.caption").write_text("of b")
    with raises(DataError, where="subfolders"):
        find_photos(tmp_path)
    found = find_photos(tmp_path, recursive=True, caption_extension=".caption")
    assert [(photo.path.name, photo.caption) for photo in found] == [("a.png", None), ("b.png", "of b")]
    assert found[1].mask == tmp_path / "deep" / "masks" / "b.png"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_of_hugging_face_folders(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png", seed=1)
    save(tmp_path / "train" / "b.png", seed=2)
    lines = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "one, two"}\n{"file_name": "train/b.png", "text": "three"}\n',
        "metadata.csv": 'file_name,text\na.png,"one, two"\ntrain/b.png,three\n',
    }
    (tmp_path / name).write_text(lines[name])
    assert [photo.caption for photo in find_photos(tmp_path, recursive=True)] == ["one, two", "three"]


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("file_name,text\ngone.png,x\n", {"where": "line 2", "given": "gone.png"}),
        ("file_name,text\n../a.png,x\n", {"where": "line 2", "given": "../a.png"}),
        ("name,text\na.png,x\n", {"where": "line 2", "expected": ("file_name", "text")}),
        ("file_name,text\na.png,x\na.png,y\n", {"where": "line 3", "given": ("a.png", "line 2")}),
    ],
)
def test_invalid_csv_metadata_are_errors(tmp_path: Path, text: str, data: dict[str, Any]) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with raises(DataError, file=tmp_path / "metadata.csv", **data):
        find_photos(tmp_path)


def test_two_metadata_files_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with raises(DataError, where="metadata", expected=1):
        find_photos(tmp_path)


def test_a_share_is_held_out_by_seed_and_never_trained_on(folders: Path) -> None:
    run = config(folders, TOY, CUP, {**TOY, "resolution": 64})
    photos, other = read_photos(run, 0.25, seed=0), read_photos(run, 0.25, seed=1)
    held = {photo.digest for part in photos.held_out for photo in part.photos}
    trained = {photo.digest for photo in photos.photos}
    assert not held & trained
    assert len(held) == 2, "one of four, one of two"
    assert len(held | trained) == 6
    assert {p.digest for part in read_photos(run, 0.25, seed=0).held_out for p in part.photos} == held
    assert {p.digest for part in other.held_out for p in part.photos} != held


def test_a_share_that_leaves_nothing_is_an_error(folders: Path) -> None:
    with raises(DataError, where="validation_share", given=0.9, expected=2):
        read_photos(config(folders, CUP), 0.9)


def test_a_folder_and_a_dataset_for_validation(folders: Path) -> None:
    run = config(folders, TOY, {**TOY, "path": "cups", "validation": True}, validation=folders / "bears")
    photos = read_photos(run)
    assert [(part.table.concept, len(part.photos)) for part in photos.held_out] == [("<toy>", 2), ("<toy>", 3)]
    assert len(photos.photos) == 4


def test_a_concept_that_no_caption_has_is_an_error(folders: Path) -> None:
    for i in range(2):
        (folders / "cups" / f"{i}.txt").write_text("a white thing")
    with raises(DataError, where="concept", expected="<cup>", given=(str(folders / "cups"),)):
        check_mentions(read_photos(config(folders, TOY, CUP)))
    check_mentions(read_photos(config(folders, TOY, {**CUP, "caption_prefix": "{concept},"})))
    (folders / "cups" / "1.txt").write_text("a white <cup>")
    check_mentions(read_photos(config(folders, TOY, CUP)))


def test_captions_without_the_concept_warn_by_dataset(folders: Path) -> None:
    from veneer.training.data.photo_folder import photo_warnings

    (folders / "cups" / "0.txt").write_text("a <toy>")
    found = photo_warnings(read_photos(config(folders, TOY, CUP)).photos)
    assert [(each.where, each.given, each.expected) for each in found] == [("captions", ("0.png",), "<cup>")]
    (folders / "cups" / "0.txt").write_text("")
    with warns(DataWarning, given=""):
        read_photos(config(folders, CUP))


def test_wildcards_are_chosen_by_step_with_equal_probability() -> None:
    captions = Captions("<toy>", templates=("a {red|blue} {concept} {on|in|under {{x|y}} }",))
    found = [captions.sample(None, 3, step, 0) for step in range(300)]
    assert found == [captions.sample(None, 3, step, 0) for step in range(300)]
    counts = Counter(text.split()[1] for text in found)
    assert counts.keys() == {"red", "blue"}
    assert min(counts.values()) > 100
    assert expand_wildcards("{{a|b}} {c}", generator(0)) == "{a|b} {c}"
    assert Captions("<toy>").longest("{a|bbb} {concept}") == ["bbb <toy>"]
    assert captions.varies(None)
    assert not captions.varies("no choice")


def test_separators_of_tags() -> None:
    captions = Captions(
        shuffle=True, tag_dropout=0.5, keep_separator="|||", secondary_separator=";;;", prefix="p,", suffix="||| s, t",
    )  # fmt: skip
    found = [captions.sample("a ||| b, c;;;d, e", 1, step, 0) for step in range(60)]
    assert all(text.startswith("p, a") and text.endswith("s, t") for text in found)
    middles = Counter(text.removeprefix("p, a, ").removesuffix("s, t").strip(", ") for text in found)
    assert {"b, c, d, e", "c, d, b", ""} & middles.keys()
    assert not any(("c" in middle) != ("d" in middle) for middle in middles), "c and d are one tag"
    plain = Captions(keep_separator="|||", secondary_separator=";;;")
    assert plain.sample("a ||| b;;;c", 0, 0, 0) == "a, b, c"


def test_invalid_options_of_a_source_are_errors(folders: Path) -> None:
    photos = find_photos(folders / "toys")
    for name, value in {"flip": 2.0, "crop": "left", "repeats": 0, "resolutions": ()}.items():
        with raises(DataError, where=name, given=value):
            PhotoSource(photos, **{"resolutions": (32,), "captions": Captions("x"), name: value})
