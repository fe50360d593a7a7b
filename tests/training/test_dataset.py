"""Photo folders and datasets: files, warnings, and batches that depend on seed and step only."""

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.raising import carries, raises, warns
from tests.training.images import DATA, gradient, save
from veneer.training.data.buckets import covering_size
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import Example, PhotoDataset, find_photos
from veneer.training.data.image_io import DataError, DataWarning, PhotoLimits
from veneer.training.data.photo_folder import photo_warnings

TOY = Captions("<toy>", prior="a photo of a toy")


def names(photos):
    return [photo.path.name for photo in photos]


def test_files_of_a_folder(tmp_path):
    save(tmp_path / "b.JPG")
    save(tmp_path / "a.png", 100, 60, 1)
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".trash" / "c.png")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "notes.md").write_text("not mine")
    (tmp_path / "Thumbs.db").touch()
    photos = find_photos(tmp_path)
    assert names(photos) == ["a.png", "b.JPG"]
    assert photos[0].size == (60, 100)
    assert [photo.caption for photo in photos] == ["a caption", None]
    assert not any(photo.is_prior or photo.mask for photo in photos)
    assert find_photos(str(tmp_path)) == photos
    assert find_photos(tmp_path / "a.png") == photos[:1]
    assert all(photo.is_prior for photo in find_photos(tmp_path, is_prior=True))


def test_the_size_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", 80, 64, exif=exif)
    assert find_photos(tmp_path)[0].size == (80, 64)


def test_nothing_to_train_on(tmp_path):
    with raises(DataError, file=tmp_path / "gone", given="missing"):
        find_photos(tmp_path / "gone")
    with raises(DataError, file=tmp_path, where=None, given=()):
        find_photos(tmp_path)
    (tmp_path / "film.mp4").touch()
    (tmp_path / "deeper").mkdir()
    with raises(DataError, file=tmp_path, where=None, given=("deeper/", "film.mp4")) as caught:
        find_photos(tmp_path)
    assert {".bmp", ".jpg", ".png"} < set(caught.value.expected)


def test_two_subjects_in_one_folder(tmp_path):
    save(tmp_path / "dog" / "a.png")
    save(tmp_path / "duck" / "a.png", seed=1)
    with raises(DataError, file=tmp_path, where="subfolders", given=("dog", "duck")):
        find_photos(tmp_path)
    save(tmp_path / "a.png", seed=2)
    with raises(DataError, file=tmp_path, where="subfolders", given=("a.png", "dog", "duck")):
        find_photos(tmp_path)
    assert names(find_photos(tmp_path / "dog")) == ["a.png"]


def test_all_unreadable_images_are_listed(tmp_path):
    save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    unreadable = {"empty.png": "empty", "page.jpg": "HTML", "phone.heic": "HEIC", "link.png": "broken link"}
    with raises(DataError, file=tmp_path) as caught:
        find_photos(tmp_path)
    assert {Path(each.file).name: each.given for each in caught.value.given} == unreadable
    assert all(name in str(caught.value) for name in unreadable)
    with warns(DataWarning, file=tmp_path) as told:
        assert names(find_photos(tmp_path, skip_unreadable=True)) == ["good.png"]
    assert {Path(each.file).name: each.given for each in told[0].message.given} == unreadable
    (tmp_path / "good.png").unlink()
    with pytest.warns(DataWarning), raises(DataError, file=tmp_path) as caught:
        find_photos(tmp_path, skip_unreadable=True)
    assert len(caught.value.given) == 4


def test_copies_warn(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "z.png").write_bytes((tmp_path / "a.png").read_bytes())
    save(tmp_path / "b.png", seed=1)
    with warns(DataWarning, where="copies", given=("a.png", "z.png")):
        assert len(find_photos(tmp_path)) == 3


def test_small_images_and_captions_without_concept_warn(tmp_path):
    save(tmp_path / "small.png", 90, 90)
    save(tmp_path / "large.png", 200, 130)
    (tmp_path / "large.txt").write_text("a photo of <toy>")
    (tmp_path / "small.txt").write_text("a photo of a toy")
    photos = find_photos(tmp_path)
    first, second = photo_warnings(photos, 128, "<toy>")
    assert (first.where, first.given, first.expected) == ("size", ("small.png",), 128)
    assert (second.where, second.given, second.expected) == ("captions", ("small.png",), "<toy>")
    with pytest.warns(DataWarning) as told:
        find_photos(tmp_path, resolution=128, concept="<toy>")
    assert [str(each.message) for each in told] == [str(first), str(second)]


def test_masks_are_found_in_three_places(tmp_path):
    for name in ("a", "b", "d"):
        save(tmp_path / f"{name}.png", seed=ord(name))
    cut = gradient(80, 64).convert("RGBA")
    cut.putalpha(Image.linear_gradient("L").resize((80, 64)))
    cut.save(tmp_path / "c.png")
    save(tmp_path / "a.mask.png", 40, 32)
    save(tmp_path / "masks" / "b.png")
    masks = {photo.path.stem: photo.mask for photo in find_photos(tmp_path)}
    assert masks == {"a": tmp_path / "a.mask.png", "b": tmp_path / "masks" / "b.png", "c": tmp_path / "c.png", "d": None}
    save(tmp_path / "gone.mask.png")
    save(tmp_path / "masks" / "lost.png")
    with warns(DataWarning, file=tmp_path, where="masks", given=("gone.mask.png", "masks/lost.png")):
        find_photos(tmp_path)


def test_a_mask_of_another_shape_or_without_white_is_an_error(tmp_path):
    save(tmp_path / "a.png", 80, 64)
    save(tmp_path / "a.mask.png", 64, 80)
    with raises(DataError, file=tmp_path) as caught:
        find_photos(tmp_path)
    (problem,) = caught.value.given
    carries(problem, file=tmp_path / "a.mask.png", where="mask", given=(64, 80), expected=(80, 64))
    Image.new("L", (80, 64)).save(tmp_path / "a.mask.png")
    with raises(DataError, file=tmp_path) as caught:
        find_photos(tmp_path)
    (problem,) = caught.value.given
    carries(problem, file=tmp_path / "a.mask.png", given="black")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven photos: four wide, two tall, one square."""
    folder = tmp_path_factory.mktemp("photos")
    shapes = [(96, 64)] * 4 + [(64, 96)] * 2 + [(80, 80)]
    for number, (width, height) in enumerate(shapes):
        save(folder / f"{number}.png", width, height, number)
    return find_photos(folder)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    for number in range(5):
        save(folder / f"class{number}.png", 64, 64, 100 + number)
    return find_photos(folder, is_prior=True)


def dataset(photos, **options):
    return PhotoDataset(photos, **{"resolution": 64, "multiple": 16, "seed": 3, "captions": TOY, **options})


def equal(one: Example, other: Example) -> bool:
    masks = (one.mask is None) == (other.mask is None) and (one.mask is None or torch.equal(one.mask, other.mask))
    plain = [replace(each, pixels=None, mask=None) for each in (one, other)]
    return masks and plain[0] == plain[1] and torch.equal(one.pixels, other.pixels)


def test_a_batch_depends_on_seed_and_step_alone(photos, prior):
    options = {"flip": 0.5, "crop": "random", "prior_photos": prior, "captions": replace(TOY, dropout=0.5)}
    straight, jumping = dataset(photos, **options), dataset(photos, memory=20_000, **options)
    expected = [straight.examples(step, 3) for step in range(12)]
    torch.manual_seed(99)
    for step in (11, 3, 3, 0, 7):
        got = jumping.examples(step, 3)
        assert all(equal(a, b) for a, b in zip(got, expected[step], strict=True))
    other = dataset(photos, **{**options, "seed": 4})
    assert any(not equal(a, b) for step in range(12) for a, b in zip(other.examples(step, 3), expected[step], strict=True))


@pytest.mark.parametrize("with_class_images", [False, True])
def test_selected_rows_equal_those_of_the_whole_batch(photos, prior, with_class_images):
    options = {"flip": 0.5, "crop": "random", "captions": replace(TOY, dropout=0.5)}
    options |= {"prior_photos": prior} if with_class_images else {}
    whole, parts = dataset(photos, **options), dataset(photos, memory=20_000, **options)
    for step in (0, 5, 13):
        batch = whole.examples(step, 6)
        for rows in ([0], [5], [4, 2], range(1, 4), []):
            expected = [batch[row] for row in rows] + [batch[6 + row] for row in rows if with_class_images]
            assert all(equal(a, b) for a, b in zip(parts.examples(step, 6, rows), expected, strict=True))


def test_only_the_selected_rows_are_loaded(photos, monkeypatch):
    data = dataset(photos, buckets=False)
    loaded = []
    monkeypatch.setattr(data, "_decode", lambda photo, *size, decode=data._decode: loaded.append(photo) or decode(photo, *size))
    data.examples(0, 7, [2, 3])
    assert len(loaded) == 2


def test_batches_are_full_and_of_one_bucket(photos, prior):
    data = dataset(photos, prior_photos=prior)
    for step in range(20):
        batch = data.examples(step, 4)
        assert len({example.pixels.shape for example in batch}) == 1
        assert [example.is_prior for example in batch] == [False] * 4 + [True] * 4
        assert torch.stack([example.pixels for example in batch]).shape[0] == 8
    assert data.counts == {(48, 80): 4, (80, 48): 2, (64, 64): 1}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("repeats", [1, 2])
def test_every_photo_is_used_equally_often(photos, batch, repeats):
    """Also those of rare aspect ratios: over `len(data)` steps each is used exactly `batch` times `repeats`."""
    data = dataset(photos, repeats=repeats)
    assert len(data) == 7 * repeats
    for cycle in range(2):
        steps = range(cycle * len(data), (cycle + 1) * len(data))
        seen = Counter(e.key for step in steps for e in data.examples(step, batch))
        assert sorted(seen.values()) == [batch * repeats] * 7


def test_each_epoch_sees_every_photo_once_in_another_order(photos):
    data = dataset(photos, buckets=False)
    keys = list(chain.from_iterable(([e.key for e in data.examples(step, 3)]) for step in range(14)))
    epochs = [tuple(keys[i : i + 7]) for i in range(0, 42, 7)]
    assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == 7 for epoch in epochs)
    assert len(set(epochs)) > 4


def test_class_images_are_dealt_evenly(photos, prior):
    data = dataset(photos[:4], prior_photos=prior)
    seen = Counter(e.key for step in range(5) for e in data.examples(step, 4) if e.is_prior)
    assert sorted(seen.values()) == [4] * 5
    assert {e.caption for e in data.examples(0, 4)} == {"a photo of <toy>", "a photo of a toy"}


def test_indices_number_the_samples_of_the_run(photos, prior):
    assert [e.index for step in range(3) for e in dataset(photos).examples(step, 4)] == list(range(12))
    with_prior = dataset(photos, prior_photos=prior)
    assert [e.index for step in range(3) for e in with_prior.examples(step, 2)] == list(range(12))


def test_pixels_are_the_resized_and_cropped_image(photos):
    data = dataset(photos[:1])
    example = data.examples(0, 1)[0]
    size = covering_size((64, 96), (48, 80))
    assert size == (53, 80)
    with Image.open(photos[0].path) as image:
        resized = pil_to_tensor(image.convert("RGB").resize((80, 53), Image.Resampling.LANCZOS))
    assert torch.equal(example.pixels, resized[:, 2:50].float() / 127.5 - 1)
    assert example.pixels.dtype == torch.float32
    assert example.size == (64, 96, 2, 0, 48, 80)
    red, green = example.pixels[0], example.pixels[1]
    assert red[:, -1].mean() > 0.9 > -0.9 > red[:, 0].mean(), "left and right"
    assert green[-1].mean() > 0.8 > -0.8 > green[0].mean(), "top and bottom"


def test_a_flip_mirrors_pixels_mask_and_sizes_together(tmp_path):
    cut = gradient(96, 64).convert("RGBA")
    cut.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))))
    cut.save(tmp_path / "a.png")
    found = find_photos(tmp_path)
    plain, mirrored = (dataset(found, flip=flip, crop="random", buckets=False).examples(0, 1)[0] for flip in (0.0, 1.0))
    assert torch.equal(plain.pixels.flip(-1), mirrored.pixels)
    assert torch.equal(plain.mask.flip(-1), mirrored.mask)
    assert plain.mask.shape == (1, 64, 64)
    assert 0 <= plain.mask.min() < plain.mask.max() <= 1
    assert plain.mask[0, 0, -1] > plain.mask[0, 0, 0]
    assert plain.size[3] + mirrored.size[3] == 96 - 64
    assert plain.key != mirrored.key
    assert dataset(found, masks=False).examples(0, 1)[0].mask is None


def test_a_mask_file_is_aligned_with_its_image(tmp_path):
    save(tmp_path / "a.png", 80, 80)
    half = Image.new("L", (40, 40), 0)
    half.paste(255, (20, 0, 40, 40))
    half.save(tmp_path / "a.mask.png")
    mask = dataset(find_photos(tmp_path)).examples(0, 1)[0].mask
    assert mask[0, :, :28].max() == 0
    assert mask[0, :, 36:].min() == 1


def test_the_key_is_of_everything_that_makes_the_pixels(photos, tmp_path):
    """Equal keys mean equal pixels, whatever the path of the file."""
    (tmp_path / "elsewhere.png").write_bytes(photos[0].path.read_bytes())
    here, there = dataset(photos[:1]).examples(0, 1)[0], dataset(find_photos(tmp_path), seed=9).examples(5, 1)[0]
    assert here.key == there.key
    assert torch.equal(here.pixels, there.pixels)
    other = {
        "picture": dataset(photos[1:2]),
        "resolution": dataset(photos[:1], resolution=80),
        "bucket": dataset(photos[:1], buckets=False),
        "flip": dataset(photos[:1], flip=1.0),
        "background": dataset(photos[:1], limits=PhotoLimits(background=(0, 0, 0))),
    }
    keys = {name: data.examples(0, 1)[0].key for name, data in other.items()}
    assert len({*keys.values(), here.key}) == len(keys) + 1
    seen = {}
    for step in range(60):
        example = dataset(photos[:1], crop="random", flip=0.5).examples(step, 1)[0]
        assert torch.equal(seen.setdefault(example.key, example.pixels), example.pixels)
    assert len(seen) > 6
    assert (dataset(photos).cacheable, dataset(photos, crop="random").cacheable) == (True, False)


def test_the_same_example_is_not_shared(photos):
    data = dataset(photos[:1])
    data.examples(0, 1)[0].pixels.zero_()
    assert data.examples(0, 1)[0].pixels.abs().max() > 0


def test_a_file_that_changes_during_a_run_is_an_error(tmp_path):
    save(tmp_path / "a.png")
    data = dataset(find_photos(tmp_path))
    save(tmp_path / "a.png", seed=5)
    with raises(DataError, file=tmp_path / "a.png", given="changed"):
        data.examples(0, 1)


def test_a_photo_without_caption_is_an_error(photos, prior):
    with raises(DataError, where="captions", given=tuple(names(photos)), expected="concept"):
        dataset(photos, captions=Captions())
    with raises(DataError, where="captions", given=tuple(names(prior)), expected="prior"):
        dataset(photos, captions=Captions("<toy>"), prior_photos=prior)
    assert dataset([replace(photos[0], caption="a thing")], captions=Captions()).examples(0, 1)[0].caption == "a thing"


@pytest.mark.parametrize(("option", "value"), [("flip", 2.0), ("crop", "centre"), ("repeats", 0), ("resolution", 60)])
def test_wrong_options(photos, option, value):
    with raises(DataError, where=option, given=value):
        dataset(photos, **{option: value})


def test_wrong_steps(photos):
    with raises(DataError, where="photos", given=0):
        dataset([])
    for step, batch in ((-1, 1), (0, 0)):
        with raises(DataError, where="examples", given=(step, batch)):
            dataset(photos).examples(step, batch)


@pytest.mark.skipif(not DATA.is_dir(), reason="the measurement data is not on this machine")
@pytest.mark.parametrize("subject", ["dog3", "duck_toy", "monster_toy"])
def test_real_photos(subject):
    found = find_photos(DATA / "subjects" / subject, resolution=128)
    assert len(found) >= 4
    data = PhotoDataset(found, 128, 8, 0, captions=TOY, flip=0.5)
    for step in range(3):
        for example in data.examples(step, 4):
            assert example.pixels.std() > 0.1
            assert example.pixels.shape[1] * example.pixels.shape[2] <= 128**2
