"""Transforms: bitwise equal to timm's and open_clip's, and augmentation that is a function of (seed, epoch, index)."""

import math
import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from tests.raising import raises
from tests.training.images import DATA, gradient, save
from veneer.classification.data.augmentation import OPERATIONS, erase, rand_augment
from veneer.classification.data.loader import DecodedImages, ImageLoader
from veneer.classification.data.sources import open_source
from veneer.classification.data.transforms import EvalView, TrainView, ViewError, crop_window
from veneer.training.data.image_io import DataError
from veneer.training.loop.seeds import generator

CLOTHING = DATA / "clothing-160"
CONFIG = {
    "input_size": (3, 48, 48),
    "interpolation": "bicubic",
    "mean": (0.48, 0.45, 0.4),
    "std": (0.27, 0.26, 0.28),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def images():
    """Wide, high, square and small images, and real photos if the dataset is available."""
    made = [gradient(*size, seed=n) for n, size in enumerate([(160, 90), (50, 130), (48, 48), (20, 16), (8, 8)])]
    found = sorted((CLOTHING / "test" / "hat").iterdir())[:6] if CLOTHING.is_dir() else []
    return [*made, *(Image.open(path).convert("RGB") for path in found)]


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224.augreg_in21k",
        "efficientnet_b0",
        "convnext_tiny",
        "beitv2_base_patch16_224",
        "vit_base_patch16_clip_224.openai",
    ],
)
def test_eval_view_equals_timm(name):
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name).to_dict()
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=known), is_training=False)
    ours = EvalView(resolve_data_config({}, pretrained_cfg=known))
    for image in images():
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(3, 48, 48), (3, 32, 64)])
def test_crop_modes_equal_timm(mode, size):
    from timm.data import create_transform

    config = {**CONFIG, "crop_mode": mode, "input_size": size}
    theirs, ours = create_transform(**config, is_training=False), EvalView(config)
    for image in images():
        pixels = ours(image)
        assert torch.equal(pixels, theirs(image))
        assert pixels.shape == size
        assert pixels.dtype == torch.float32


def test_eval_view_equals_open_clip():
    from open_clip import image_transform

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    theirs = image_transform(64, is_train=False, mean=mean, std=std)
    ours = EvalView({"input_size": (3, 64, 64), "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0})
    for image in images():
        assert torch.equal(ours(image), theirs(image))


def test_squash_resizes_without_crop():
    view = EvalView(CONFIG, squash=True)
    for image in images():
        whole = F.to_tensor(image.resize((48, 48), Image.Resampling.BICUBIC))
        assert torch.equal(view(image), F.normalize(whole, CONFIG["mean"], CONFIG["std"]))


@pytest.mark.parametrize("size", [None, (1, 48, 48), (48, 48)])
def test_config_without_valid_size(size):
    with raises(ViewError, where="input_size", given=size):
        EvalView({**CONFIG, "input_size": size})


def test_unknown_augmentation():
    with raises(ViewError, where="augmentation", given="wild", expected=("none", "light", "flip", "strong")):
        TrainView(CONFIG, "wild", 0)


def test_augmentation_none_equals_eval_view():
    view, plain = TrainView(CONFIG, "none", 0), EvalView(CONFIG)
    for image in images():
        assert torch.equal(view(image, 3, 5), plain(image))


@pytest.mark.parametrize("augmentation", ["light", "flip", "strong"])
def test_augmentation_depends_on_seed_epoch_and_index_only(augmentation):
    image = gradient(100, 80)
    view = TrainView(CONFIG, augmentation, 7)
    first = view(image, 2, 11)
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert torch.equal(TrainView(CONFIG, augmentation, 7)(image, 2, 11), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    for other in (view(image, 3, 11), view(image, 2, 12), TrainView(CONFIG, augmentation, 8)(image, 2, 11)):
        assert not torch.equal(other, first)


def test_light_crops_and_flip_mirrors_half_of_the_images():
    image, mirrored = gradient(100, 80), 0
    light, flip = TrainView(CONFIG, "light", 0), TrainView(CONFIG, "flip", 0)
    for index in range(200):
        top, left, high, wide = crop_window((80, 100), generator(0, "view", 1, index))
        part = image.crop((left, top, left + wide, top + high)).resize((48, 48), Image.Resampling.BICUBIC)
        straight = F.normalize(F.to_tensor(part), CONFIG["mean"], CONFIG["std"])
        assert torch.equal(light(image, 1, index), straight)
        augmented = flip(image, 1, index)
        assert torch.equal(augmented, straight) or torch.equal(augmented, straight.flip(-1))
        mirrored += torch.equal(augmented, straight.flip(-1))
    assert 70 <= mirrored <= 130


def test_mirror_false_disables_flips():
    light, flip = TrainView(CONFIG, "light", 0), TrainView(CONFIG, "flip", 0, mirror=False)
    assert all(torch.equal(light(gradient(60, 60), 0, index), flip(gradient(60, 60), 0, index)) for index in range(20))


@pytest.mark.parametrize("size", [(100, 100), (80, 120), (300, 20), (7, 9), (1, 1)])
def test_crop_windows_lie_in_the_image(size):
    drawn = [crop_window(size, generator(0, index)) for index in range(600)]
    for top, left, high, wide in drawn:
        assert 0 <= top <= top + high <= size[0]
        assert 0 <= left <= left + wide <= size[1]
        assert high > 0 < wide
    if size == (100, 100):
        areas = [high * wide / 1e4 for _, _, high, wide in drawn]
        assert 0.48 < min(areas) < 0.55
        assert 0.95 < max(areas) <= 1
        assert all(0.7 < wide / high < 1.4 for _, _, high, wide in drawn)
    if size == (300, 20):  # no crop of half the area fits: the largest center crop of 3:4
        assert set(drawn) == {(136, 0, 27, 20)}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0, 9, 30])
def test_operations_match_torchvision(name, sign, level):
    """Levels are torchvision's magnitude bins, 31 of them."""
    image, fill = gradient(60, 40), [10.0, 200.0, 30.0]
    magnitudes, signed = RandAugment()._augmentation_space(31, (40, 60))[name]
    magnitude = float(magnitudes[level]) if magnitudes.ndim else 0.0
    theirs = _apply_op(image, name, sign * magnitude if signed else magnitude, InterpolationMode.BILINEAR, fill)
    ours = OPERATIONS[name](image, sign * level / 30, fill)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1  # their magnitudes are float32


def test_rand_augment_samples_two_operations():
    image = gradient(30, 30)
    pairs = {
        OPERATIONS[a](OPERATIONS[b](image, t * 0.3, [0, 0, 0]), s * 0.3, [0, 0, 0]).tobytes()
        for a in OPERATIONS
        for b in OPERATIONS
        for s in (1, -1)
        for t in (1, -1)
    }
    drawn = [rand_augment(image, generator(0, index)).tobytes() for index in range(300)]
    assert set(drawn) <= pairs
    assert len(set(drawn)) > 150


def test_random_erasing():
    for index in range(100):
        pixels = torch.ones(3, 40, 60)
        erased = erase(pixels, generator(index))
        gone = erased[0] == 0
        rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
        assert torch.equal(erased, (~gone).float().expand(3, -1, -1))
        assert gone.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < gone.float().mean() < 0.36
        assert (pixels == 1).all()


def test_strong_augmentation():
    red = Image.new("RGB", (60, 60), (255, 0, 0))
    view = TrainView({**CONFIG, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, "strong", 0)
    augmented = [view(red, 0, index) for index in range(200)]
    assert all(each.shape == (3, 48, 48) and bool(each.isfinite().all()) for each in augmented)
    assert len({each.numpy().tobytes() for each in augmented}) > 60


@pytest.fixture
def source(tmp_path):
    for seed, name in enumerate("ab"):
        for number in range(5):
            save(tmp_path / name / f"{number}.png", 90, 70, seed=10 * seed + number)
    return open_source(tmp_path)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("cached", [False, True])
def test_batches_equal_a_sequential_loop(source, threads, cached):
    view = TrainView(CONFIG, "strong", 3)
    indices = [7, 0, 3, 9, 1, 1, 4]
    expected = torch.stack([view(source.read(source.examples[index]), 2, index) for index in indices])
    with ImageLoader(DecodedImages(source) if cached else source, view, threads) as pixels:
        found = list(pixels.batches(indices, 3, epoch=2))
        assert [len(labels) for _, labels in found] == [3, 3, 1]
        assert torch.equal(torch.cat([each for each, _ in found]), expected)
        assert torch.cat([labels for _, labels in found]).tolist() == [int(index > 4) for index in indices]
        pixels.prefetch([(2, 7), (2, 0)])
        again, labels = pixels([(2, 7), (2, 0), (2, 7)])
        assert torch.equal(again, expected[[0, 1, 0]])
        assert labels.dtype == torch.int64


def test_early_exit_stops_the_threads(source):
    before = threading.active_count()
    with ImageLoader(source, EvalView(CONFIG), 3) as pixels:
        next(pixels.batches(range(10), 2))
    assert threading.active_count() == before


def test_missing_image_error_names_the_file(source, tmp_path):
    (tmp_path / "b" / "2.png").unlink()
    with ImageLoader(source, EvalView(CONFIG)) as pixels, raises(DataError, file=tmp_path / "b" / "2.png", given="missing"):
        list(pixels.batches(range(10), 4))


def test_image_cache_is_limited_in_size(source, monkeypatch):
    one = 3 * 90 * 70
    cache = DecodedImages(source, limit=4 * one + 10)
    first = [np.asarray(cache.image(index)) for index in range(10)]
    assert cache.size == 4 * one
    reads = []
    read = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, each: reads.append(each) or read(self, each))
    again = [np.asarray(cache.image(index)) for index in range(10)]
    assert all(map(np.array_equal, first, again))
    assert [each.name for each in reads] == [each.name for each in source.examples[4:]]


def test_image_cache_downscales_to_side(source):
    assert DecodedImages(source, side=35).image(0).size == (45, 35)
    assert DecodedImages(source, side=70).image(0).size == (90, 70)
    assert DecodedImages(source, side=200).image(0).size == (90, 70)


def test_image_cache_side_must_suit_the_view(source):
    view = TrainView(CONFIG, "light", 0)
    assert view.side == math.ceil(48 / math.sqrt(0.375))
    big = gradient(400, 300)
    small = big.resize((round(400 * view.side / 300), view.side), Image.Resampling.LANCZOS)
    assert (view(big, 0, 0) - view(small, 0, 0)).abs().mean() < 0.1
    with raises(DataError, where="side", given=79, expected=None):
        ImageLoader(DecodedImages(source, side=79), EvalView(CONFIG))
    with raises(DataError, where="side", given=20, expected=79):
        ImageLoader(DecodedImages(source, side=20), view)


def test_empty_batches_and_invalid_size(source):
    with ImageLoader(source, EvalView(CONFIG)) as pixels:
        assert list(pixels.batches([], 3)) == []
        with raises(DataError, where="size", given=0, expected=1):
            list(pixels.batches([1], 0))


def test_digits_are_upscaled():
    source = open_source("digits")
    with ImageLoader(source, EvalView(CONFIG)) as pixels:
        augmented, labels = next(pixels.batches(range(16), 16))
    assert augmented.shape == (16, 3, 48, 48)
    assert labels.tolist() == [each.label for each in source.examples[:16]]
    back = augmented * torch.tensor(CONFIG["std"])[:, None, None] + torch.tensor(CONFIG["mean"])[:, None, None]
    assert torch.allclose(back[:, 0], back[:, 2], atol=1e-5)
