"""Bucket sizes, the bucket of an image, and the position of its crop."""

import math

import pytest
import torch

from tests.raising import raises
from veneer.training.data.buckets import BucketPlan, count, covering_size, place_crop, visible_share
from veneer.training.data.image_io import DataError
from veneer.training.loop.seeds import generator


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 64), (1024, 32), (128, 8), (64, 16), (8, 8)])
def test_every_bucket_keeps_the_rules(resolution, multiple):
    plan = BucketPlan(resolution, multiple)
    sizes = plan.sizes()
    low, high = plan.bounds
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert low <= min(height, width) <= max(height, width) <= high
        assert (width, height) in sizes
        grown = max(height, width), min(height, width) + multiple
        assert grown[0] * grown[1] > resolution**2 or grown[1] > grown[0], "a larger bucket of that side would fit"


def test_the_published_example():
    """The 512 buckets of NovelAI's text and of kohya's defaults: 256 to 1024 in steps of 64."""
    assert BucketPlan(512, 64).bounds == (256, 1024)
    wide = {(256, side) for side in (832, 896, 960, 1024)} | {(320, 704), (320, 768), (384, 640), (448, 576), (512, 512)}
    assert set(BucketPlan(512, 64).sizes()) == wide | {size[::-1] for size in wide}


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((100, 100), (512, 512)),
        ((2000, 100), (1024, 256)),
        ((683, 512), (576, 448)),
    ],
)
def test_choice(size, bucket):
    assert BucketPlan(512, 64).choose(size) == bucket


def test_choice_is_the_nearest_ratio_and_the_same_both_ways_round():
    plan = BucketPlan(512, 64)
    for height in range(100, 1200, 37):
        for width in range(100, 1200, 41):
            chosen = plan.choose((height, width))
            assert plan.choose((width, height)) == chosen[::-1]
            errors = {b: abs(math.log(b[0] / b[1]) - math.log(height / width)) for b in plan.sizes()}
            assert errors[chosen] <= min(errors.values()) + 1e-8


def test_square_only():
    plan = BucketPlan(512, 64, square=True)
    assert plan.sizes() == [(512, 512)]
    assert plan.choose((100, 900)) == (512, 512)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((300, 200), (256, 192)), ((2000, 2000), (512, 512)), ((1500, 1000), (576, 384)), ((70, 5000), (64, 1024))],
)
def test_without_enlarging(size, bucket):
    plan = BucketPlan(512, 64, upscale=False)
    assert plan.choose(size) == bucket
    resized = covering_size(size, bucket)
    assert resized[0] <= size[0]
    assert resized[1] <= size[1]


def test_too_small_without_enlarging_is_an_error():
    with raises(DataError, where="upscale", given=(63, 500), expected=64):
        BucketPlan(512, 64, upscale=False).choose((63, 500))
    assert BucketPlan(512, 64, upscale=False, square=True).choose((90, 300)) == (64, 64)


@pytest.mark.parametrize(
    ("options", "where", "given", "expected"),
    [
        ({"resolution": 500}, "resolution", 500, (448, 512)),
        ({"resolution": 32}, "resolution", 32, (64, 128)),
        ({"resolution": 512, "max_side": 448}, "bounds", (256, 448), 512),
        ({"resolution": 512, "min_side": 513}, "bounds", (576, 1024), 512),
    ],
)
def test_wrong_plans(options, where, given, expected):
    with raises(DataError, where=where, given=given, expected=expected):
        BucketPlan(**options, multiple=64)


def test_cover_covers_and_hardly_stretches():
    for height in range(20, 900, 53):
        for width in range(20, 900, 59):
            for bucket in ((512, 512), (256, 1024), (576, 448)):
                resized = covering_size((height, width), bucket)
                assert resized[0] >= bucket[0]
                assert resized[1] >= bucket[1]
                assert resized[0] == bucket[0] or resized[1] == bucket[1]
                scale = max(bucket[0] / height, bucket[1] / width)
                assert abs(resized[0] - height * scale) <= 0.5 + 1e-6
                assert abs(resized[1] - width * scale) <= 0.5 + 1e-6


def test_center_window():
    window = place_crop((1000, 500), (512, 512), "center", 0.0, generator(0))
    assert window == ((1024, 512), (512, 512), 256, 0, False)
    assert window.micro((1000, 500)) == (1000, 500, 256, 0, 512, 512)


def test_random_windows_reach_every_place_and_no_further():
    tops = [place_crop((516, 512), (512, 512), "random", 0.0, generator("w", i)).top for i in range(500)]
    assert set(tops) == {0, 1, 2, 3, 4}
    assert all(60 < tops.count(top) < 145 for top in set(tops))


def test_crop_left_of_a_flipped_image_counts_from_the_right_edge():
    """Flipping the resized image first and cropping at the reported position gives the same pixels."""
    whole = torch.arange(512 * 700).reshape(1, 512, 700)
    for i in range(20):
        window = place_crop((512, 700), (512, 512), "random", 1.0, generator(i))
        assert window.flip
        seen = whole[:, :, window.left : window.left + 512].flip(-1)
        top, left = window.micro((512, 700))[2:4]
        assert torch.equal(whole.flip(-1)[:, top : top + 512, left : left + 512], seen)


def test_flip_rate_and_independence_from_the_crop():
    windows = [place_crop((600, 512), (512, 512), "random", 0.3, generator("f", i)) for i in range(2000)]
    assert 0.26 < sum(w.flip for w in windows) / 2000 < 0.34
    centered = [place_crop((600, 512), (512, 512), "center", 0.3, generator("f", i)) for i in range(2000)]
    assert [w.flip for w in windows] == [w.flip for w in centered]


def test_visible_share_and_count():
    assert visible_share((512, 512), (512, 512)) == 1
    assert visible_share((1024, 512), (512, 512)) == 0.5
    assert count([(1, 1), (2, 1), (1, 1)]) == {(1, 1): 2, (2, 1): 1}
