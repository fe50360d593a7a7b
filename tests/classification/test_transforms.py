"""Views: timm's and open_clip's own transforms to the bit, and augmentations that are functions of (seed, epoch, index)."""

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
from tests.training.pictures import DATA, gradient, save
from veneer.classification.data.augmentation import OPERATIONS, erase, rand_augment
from veneer.classification.data.loader import Pixels, Shelf
from veneer.classification.data.sources import find_pictures
from veneer.classification.data.transforms import EvalView, TrainView, ViewError, window
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


def pictures():
    """Wide, high, square, small; and real photos where they are."""
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
def test_the_eval_view_is_timms_own(name):
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name).to_dict()
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=known), is_training=False)
    ours = EvalView(resolve_data_config({}, pretrained_cfg=known))
    for picture in pictures():
        assert torch.equal(ours(picture), theirs(picture))


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(3, 48, 48), (3, 32, 64)])
def test_every_crop_mode_is_timms(mode, size):
    from timm.data import create_transform

    config = {**CONFIG, "crop_mode": mode, "input_size": size}
    theirs, ours = create_transform(**config, is_training=False), EvalView(config)
    for picture in pictures():
        pixels = ours(picture)
        assert torch.equal(pixels, theirs(picture))
        assert pixels.shape == size
        assert pixels.dtype == torch.float32


def test_the_eval_view_is_open_clips_own():
    from open_clip import image_transform

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    theirs = image_transform(64, is_train=False, mean=mean, std=std)
    ours = EvalView({"input_size": (3, 64, 64), "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0})
    for picture in pictures():
        assert torch.equal(ours(picture), theirs(picture))


def test_squash_resizes_to_exactly_the_side():
    view = EvalView(CONFIG, squash=True)
    for picture in pictures():
        whole = F.to_tensor(picture.resize((48, 48), Image.Resampling.BICUBIC))
        assert torch.equal(view(picture), F.normalize(whole, CONFIG["mean"], CONFIG["std"]))


@pytest.mark.parametrize("size", [None, (1, 48, 48), (48, 48)])
def test_a_config_without_a_usable_size(size):
    with raises(ViewError, where="input_size", given=size):
        EvalView({**CONFIG, "input_size": size})


def test_an_unknown_augmentation():
    with raises(ViewError, where="augmentation", given="wild", expected=("none", "light", "flip", "strong")):
        TrainView(CONFIG, "wild", 0)


def test_without_augmentation_training_sees_the_eval_view():
    view, plain = TrainView(CONFIG, "none", 0), EvalView(CONFIG)
    for picture in pictures():
        assert torch.equal(view(picture, 3, 5), plain(picture))


@pytest.mark.parametrize("augmentation", ["light", "flip", "strong"])
def test_a_draw_depends_on_seed_epoch_and_index_alone(augmentation):
    picture = gradient(100, 80)
    view = TrainView(CONFIG, augmentation, 7)
    first = view(picture, 2, 11)
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert torch.equal(TrainView(CONFIG, augmentation, 7)(picture, 2, 11), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    for other in (view(picture, 3, 11), view(picture, 2, 12), TrainView(CONFIG, augmentation, 8)(picture, 2, 11)):
        assert not torch.equal(other, first)


def test_light_is_the_window_resized_and_flip_is_light_mirrored_half_of_the_time():
    picture, mirrored = gradient(100, 80), 0
    light, flip = TrainView(CONFIG, "light", 0), TrainView(CONFIG, "flip", 0)
    for index in range(200):
        top, left, high, wide = window((80, 100), generator(0, "view", 1, index))
        part = picture.crop((left, top, left + wide, top + high)).resize((48, 48), Image.Resampling.BICUBIC)
        straight = F.normalize(F.to_tensor(part), CONFIG["mean"], CONFIG["std"])
        assert torch.equal(light(picture, 1, index), straight)
        seen = flip(picture, 1, index)
        assert torch.equal(seen, straight) or torch.equal(seen, straight.flip(-1))
        mirrored += torch.equal(seen, straight.flip(-1))
    assert 70 <= mirrored <= 130


def test_what_must_not_be_mirrored_is_not():
    light, flip = TrainView(CONFIG, "light", 0), TrainView(CONFIG, "flip", 0, mirror=False)
    assert all(torch.equal(light(gradient(60, 60), 0, index), flip(gradient(60, 60), 0, index)) for index in range(20))


@pytest.mark.parametrize("size", [(100, 100), (80, 120), (300, 20), (7, 9), (1, 1)])
def test_windows_lie_in_the_picture_and_are_spread(size):
    drawn = [window(size, generator(0, index)) for index in range(600)]
    for top, left, high, wide in drawn:
        assert 0 <= top <= top + high <= size[0]
        assert 0 <= left <= left + wide <= size[1]
        assert high > 0 < wide
    if size == (100, 100):
        areas = [high * wide / 1e4 for _, _, high, wide in drawn]
        assert 0.48 < min(areas) < 0.55
        assert 0.95 < max(areas) <= 1
        assert all(0.7 < wide / high < 1.4 for _, _, high, wide in drawn)
    if size == (300, 20):  # nothing of half the area fits: the largest 3:4 in the middle
        assert set(drawn) == {(136, 0, 27, 20)}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0, 9, 30])
def test_the_operations_are_torchvisions(name, sign, level):
    """Levels are torchvision's magnitude bins, 31 of them."""
    picture, fill = gradient(60, 40), [10.0, 200.0, 30.0]
    magnitudes, signed = RandAugment()._augmentation_space(31, (40, 60))[name]
    magnitude = float(magnitudes[level]) if magnitudes.ndim else 0.0
    theirs = _apply_op(picture, name, sign * magnitude if signed else magnitude, InterpolationMode.BILINEAR, fill)
    ours = OPERATIONS[name](picture, sign * level / 30, fill)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1  # their magnitudes are float32


def test_rand_augment_draws_two_operations_evenly():
    picture = gradient(30, 30)
    pairs = {
        OPERATIONS[a](OPERATIONS[b](picture, t * 0.3, [0, 0, 0]), s * 0.3, [0, 0, 0]).tobytes()
        for a in OPERATIONS
        for b in OPERATIONS
        for s in (1, -1)
        for t in (1, -1)
    }
    drawn = [rand_augment(picture, generator(0, index)).tobytes() for index in range(300)]
    assert set(drawn) <= pairs
    assert len(set(drawn)) > 150


def test_a_patch_is_erased():
    for index in range(100):
        pixels = torch.ones(3, 40, 60)
        erased = erase(pixels, generator(index))
        gone = erased[0] == 0
        rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
        assert torch.equal(erased, (~gone).float().expand(3, -1, -1))
        assert gone.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < gone.float().mean() < 0.36
        assert (pixels == 1).all()


def test_strong_erases_a_quarter():
    grey = Image.new("RGB", (60, 60), (255, 0, 0))
    view = TrainView({**CONFIG, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, "strong", 0)
    seen = [view(grey, 0, index) for index in range(200)]
    assert all(each.shape == (3, 48, 48) and bool(each.isfinite().all()) for each in seen)
    assert len({each.numpy().tobytes() for each in seen}) > 60


@pytest.fixture
def source(tmp_path):
    for seed, name in enumerate("ab"):
        for number in range(5):
            save(tmp_path / name / f"{number}.png", 90, 70, seed=10 * seed + number)
    return find_pictures(tmp_path)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("shelved", [False, True])
def test_batches_are_those_of_a_plain_loop(source, threads, shelved):
    view = TrainView(CONFIG, "strong", 3)
    indices = [7, 0, 3, 9, 1, 1, 4]
    expected = torch.stack([view(source.read(source.examples[index]), 2, index) for index in indices])
    with Pixels(Shelf(source) if shelved else source, view, threads) as pixels:
        found = list(pixels.batches(indices, 3, epoch=2))
        assert [len(labels) for _, labels in found] == [3, 3, 1]
        assert torch.equal(torch.cat([each for each, _ in found]), expected)
        assert torch.cat([labels for _, labels in found]).tolist() == [int(index > 4) for index in indices]
        pixels.expect([(2, 7), (2, 0)])
        again, labels = pixels([(2, 7), (2, 0), (2, 7)])
        assert torch.equal(again, expected[[0, 1, 0]])
        assert labels.dtype == torch.int64


def test_a_loop_left_early_leaves_no_thread(source):
    before = threading.active_count()
    with Pixels(source, EvalView(CONFIG), 3) as pixels:
        next(pixels.batches(range(10), 2))
    assert threading.active_count() == before


def test_a_picture_that_is_gone_ends_the_batch_with_its_name(source, tmp_path):
    (tmp_path / "b" / "2.png").unlink()
    with Pixels(source, EvalView(CONFIG)) as pixels, raises(DataError, file=tmp_path / "b" / "2.png", given="missing"):
        list(pixels.batches(range(10), 4))


def test_a_shelf_keeps_what_fits_and_gives_the_same(source, monkeypatch):
    one = 3 * 90 * 70
    shelf = Shelf(source, limit=4 * one + 10)
    first = [np.asarray(shelf.picture(index)) for index in range(10)]
    assert shelf.held == 4 * one
    reads = []
    read = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, each: reads.append(each) or read(self, each))
    again = [np.asarray(shelf.picture(index)) for index in range(10)]
    assert all(map(np.array_equal, first, again))
    assert [each.name for each in reads] == [each.name for each in source.examples[4:]]


def test_a_shelf_shrinks_what_is_larger(source):
    assert Shelf(source, side=35).picture(0).size == (45, 35)
    assert Shelf(source, side=70).picture(0).size == (90, 70)
    assert Shelf(source, side=200).picture(0).size == (90, 70)


def test_a_shrunk_shelf_loses_little_and_only_where_it_may(source):
    view = TrainView(CONFIG, "light", 0)
    assert view.side == math.ceil(48 / math.sqrt(0.375))
    big = gradient(400, 300)
    small = big.resize((round(400 * view.side / 300), view.side), Image.Resampling.LANCZOS)
    assert (view(big, 0, 0) - view(small, 0, 0)).abs().mean() < 0.1
    with raises(DataError, where="side", given=79, expected=None):
        Pixels(Shelf(source, side=79), EvalView(CONFIG))
    with raises(DataError, where="side", given=20, expected=79):
        Pixels(Shelf(source, side=20), view)


def test_batches_of_nothing(source):
    with Pixels(source, EvalView(CONFIG)) as pixels:
        assert list(pixels.batches([], 3)) == []
        with raises(DataError, where="size", given=0, expected=1):
            list(pixels.batches([1], 0))


def test_the_digits_are_enlarged():
    source = find_pictures("digits")
    with Pixels(source, EvalView(CONFIG)) as pixels:
        seen, labels = next(pixels.batches(range(16), 16))
    assert seen.shape == (16, 3, 48, 48)
    assert labels.tolist() == [each.label for each in source.examples[:16]]
    back = seen * torch.tensor(CONFIG["std"])[:, None, None] + torch.tensor(CONFIG["mean"])[:, None, None]
    assert torch.allclose(back[:, 0], back[:, 2], atol=1e-5)
