"""Captions: sources, augmentation, and errors."""

import json
from collections import Counter

import pytest

from tests.raising import raises, warns
from veneer.training.data.caption_files import read_captions
from veneer.training.data.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES, Captions, longest_prefix, mentions
from veneer.training.data.image_io import DataError, DataWarning

KEYS = ("file_name", "text")


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(b"not looked at here")
    return paths


def lines(folder, *entries):
    text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def test_text_files_and_metadata_together(tmp_path, photos):
    (tmp_path / "a.txt").write_bytes("\ufeffa photo\r\n of  <toy> in Zürich \n".encode())
    lines(tmp_path, {"file_name": "b.png", "text": "second\u2028line"}, "", {"file_name": "./c.png", "caption": "third"})
    found = read_captions(tmp_path, photos)
    assert found == {photos[0]: "a photo of <toy> in Zürich", photos[1]: "second line", photos[2]: "third"}


def test_an_empty_caption_file_gives_no_caption(tmp_path, photos):
    (tmp_path / "a.txt").write_text(" \n")
    lines(tmp_path, {"file_name": "b.png", "text": ""})
    with warns(DataWarning, given="") as told:
        assert read_captions(tmp_path, photos) == {}
    assert [each.message.file for each in told] == [str(photos[0]), str(photos[1])]


def test_two_different_captions_warn(tmp_path, photos):
    (tmp_path / "a.txt").write_text("one")
    lines(tmp_path, {"file_name": "a.png", "text": "two"})
    with warns(DataWarning, file=photos[0], given=("one", "two")):
        assert read_captions(tmp_path, photos) == {photos[0]: "one"}


@pytest.mark.parametrize(
    ("line", "data"),
    [
        ('{"file_name": "b.png", "text": ', {"expected": "JSON"}),
        ("[" * 100_000, {"expected": "JSON"}),
        ('["b.png", "words"]', {"given": {}, "expected": KEYS}),
        ('{"text": "words"}', {"given": {"text": "words"}, "expected": KEYS}),
        ('{"file_name": "b.png"}', {"given": {"file_name": "b.png"}, "expected": KEYS}),
        ('{"file_name": "b.png", "text": 7}', {"given": {"file_name": "b.png", "text": 7}, "expected": KEYS}),
        ('{"file_name": "gone.png", "text": "x"}', {"given": "gone.png"}),
        ('{"file_name": "../a.png", "text": "x"}', {"given": "../a.png"}),
        ('{"file_name": "/etc/passwd", "text": "x"}', {"given": "/etc/passwd"}),
        ('{"file_name": "a.png", "text": "again"}', {"given": ("a.png", "line 1")}),
    ],
)
def test_an_invalid_line_is_an_error_with_its_number(tmp_path, photos, line, data):
    lines(tmp_path, {"file_name": "a.png", "text": "fine"}, line)
    with raises(DataError, file=tmp_path / "metadata.jsonl", where="line 2", **data) as caught:
        read_captions(tmp_path, photos)
    assert len(str(caught.value)) < 600


def test_captions_do_not_reach_out_of_the_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.png").touch()
    lines(inner, {"file_name": "../a.png", "text": "x"})
    with raises(DataError, file=inner / "metadata.jsonl", where="line 1", given="../a.png"):
        read_captions(inner, [])


def test_text_that_is_not_utf8_is_an_error(tmp_path, photos):
    (tmp_path / "b.txt").write_bytes("Zürich".encode("latin-1"))
    with raises(DataError, file=tmp_path / "b.txt", where="byte 1", expected="UTF-8"):
        read_captions(tmp_path, photos)


def draws(captions, written=None, count=400, **options):
    return [captions.sample(written, 7, step, step % 4, **options) for step in range(count)]


def test_a_caption_is_a_pure_function():
    captions = Captions("<toy>", dropout=0.3, tag_dropout=0.3, shuffle=True, templates=OBJECT_TEMPLATES)
    forward = [captions.sample("a, b, c, d, e", 1, step, 0) for step in range(50)]
    backward = [captions.sample("a, b, c, d, e", 1, step, 0) for step in reversed(range(50))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 20
    assert forward != [captions.sample("a, b, c, d, e", 2, step, 0) for step in range(50)]
    assert forward != [captions.sample("a, b, c, d, e", 1, step, 1) for step in range(50)]


def test_templates_stand_in_for_missing_captions():
    seen = Counter(draws(Captions("<toy>", templates=OBJECT_TEMPLATES), count=1400))
    assert set(seen) == {each.replace("{concept}", "<toy>") for each in OBJECT_TEMPLATES}
    assert min(seen.values()) > 50
    assert draws(Captions("<toy>"), count=1) == ["a photo of <toy>"]
    assert draws(Captions("<toy>"), "my {concept}, {odd} braces", count=1) == ["my <toy>, {odd} braces"]
    assert draws(Captions("<toy>", prior="a photo of a toy"), is_prior=True, count=1) == ["a photo of a toy"]
    assert all(each.count("{concept}") == 1 for each in OBJECT_TEMPLATES + STYLE_TEMPLATES)


def test_dropout_has_the_stated_rate_and_comes_first():
    plain = draws(Captions("<toy>", dropout=0.25), "a, b, c", count=4000)
    assert 0.22 < plain.count("") / 4000 < 0.28
    assert set(plain) == {"", "a, b, c"}
    tagged = draws(Captions("<toy>", dropout=0.25, shuffle=True), "a, b, c", count=4000)
    assert [each == "" for each in plain] == [each == "" for each in tagged]
    assert set(draws(Captions("<toy>", dropout=1.0))) == {""}
    left = Counter(draws(Captions("<toy>", dropout=0.5, templates=("a", "b", "c", "d")), count=4000))
    assert all(420 < left[each] < 580 for each in "abcd"), "dropout and choice of template hang together"


def test_shuffling_keeps_the_first_tags_and_loses_none():
    seen = draws(Captions(shuffle=True, keep_tokens=2), "one,two , three,four,,five")
    assert all(each.startswith("one, two, ") for each in seen)
    assert all(sorted(each.split(", ")) == ["five", "four", "one", "three", "two"] for each in seen)
    assert len(set(seen)) == 6


def test_tag_dropout_has_the_stated_rate_and_keeps_order():
    seen = draws(Captions(tag_dropout=0.4, keep_tokens=1), "one, two, three, four", count=2000)
    counts = Counter(tag for each in seen for tag in each.split(", "))
    assert counts["one"] == 2000
    assert all(0.56 < counts[tag] / 2000 < 0.64 for tag in ("two", "three", "four"))
    order = ["one", "two", "three", "four"]
    assert all(tags == sorted(tags, key=order.index) for tags in (each.split(", ") for each in seen))


@pytest.mark.parametrize(
    ("concept", "caption", "there"),
    [
        ("<toy>", "a photo of <toy>", True),
        ("<toy>", "a photo of {concept}", True),
        ("<toy>", "a photo of a toy", False),
        ("cat", "a category of things", False),
        ("sks dog", "An SKS Dog, running", True),
        ("a.b", "axb", False),
    ],
)
def test_mentions(concept, caption, there):
    assert mentions(concept, caption) is there


def test_lacks_is_true_without_caption_and_concept():
    assert Captions().lacks(None)
    assert Captions().lacks("a {concept}")
    assert not Captions().lacks("a dog")
    assert not Captions(templates=("a dog",)).lacks(None)
    assert not Captions("<toy>").lacks(None)
    assert Captions("<toy>").lacks(None, is_prior=True)
    assert not Captions("<toy>", prior="a toy").lacks(None, is_prior=True)


@pytest.mark.parametrize(
    "options", [{"dropout": 1.5}, {"tag_dropout": -0.1}, {"keep_tokens": -1}, {"templates": ()}, {"templates": "a"}]
)
def test_wrong_options(options):
    ((name, value),) = options.items()
    with raises(DataError, where=name, given=value):
        Captions(**options)


@pytest.mark.parametrize("most", range(6))
def test_the_longest_start_that_fits(most: int) -> None:
    """Whole words without trailing punctuation; the text itself if it fits."""
    words = ["a", "red,", "small", "house"]
    found = longest_prefix("  ".join(words), lambda start: len(start.split()) <= most)
    assert found == ("a  red,  small  house" if most >= 4 else "  ".join(words[:most]).rstrip(","))
