"""Scores against loops over pixels, and their invariances."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.control.images import PURPLE, SKY, disc, drawing, scene
from tests.raising import raises
from veneer.control.map_agreement import agreement, correlation, explained, line_f1, mismatched, overlap, tolerance
from veneer.control.maps.maps import computed, get
from veneer.injection.errors import OptionError, UnknownName

BLACK = Image.new("RGB", (64, 64))
TONES = [name for name in computed() if get(name).measures == "tones"]


def lines(*columns, side=64):
    """White columns on black."""
    values = np.zeros((side, side), bool)
    values[:, list(columns)] = True
    return drawing(values)


def slow_f1(wanted, made, reach):
    w, m = ([(y, x) for y, x in np.argwhere(np.asarray(each)[..., 0] >= 128)] for each in (wanted, made))

    def near(ours, theirs):
        right = 0
        for y, x in ours:
            right += any(math.hypot(y - v, x - u) <= reach for v, u in theirs)
        return right / len(ours)

    precision, recall = near(m, w), near(w, m)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize(("size", "reach"), [((64, 64), 1), ((64, 90), 1), ((400, 401), 2), ((512, 600), 3), ((16, 16), 1)])
def test_f1_is_the_slow_one(size, reach):
    assert tolerance(size) == reach
    for seed, share in enumerate((0.0005, 0.01, 0.03)):
        rng = np.random.default_rng(seed)
        wanted, made = np.zeros((2, *size[::-1]), bool)
        picked = rng.permutation(wanted.size)[: max(3, min(80, int(share * wanted.size)))]
        wanted.flat[picked] = True
        made.flat[(picked + rng.integers(0, 2 * reach + 2, len(picked))) % made.size] = True
        wanted, made = drawing(wanted), drawing(made)
        assert line_f1(wanted, made) == pytest.approx(slow_f1(wanted, made, reach))


@pytest.mark.parametrize(("side", "reach"), [(64, 1), (400, 2), (512, 3)])
def test_an_edge_may_move_by_the_tolerance_and_no_further(side, reach):
    middle = side // 2
    for way in (1, -1):
        assert line_f1(lines(middle, side=side), lines(middle + way * reach, side=side)) == 1
        assert line_f1(lines(middle, side=side), lines(middle + way * (reach + 1), side=side)) == 0
    assert line_f1(lines(9, middle, side=side), lines(middle, side=side)) == pytest.approx(2 / 3)  # P = 1, R = 1/2
    assert line_f1(lines(middle, side=side), lines(9, middle, side=side)) == pytest.approx(2 / 3)


def test_overlap_by_hand():
    wanted, made = np.zeros((2, 64, 64), bool)
    wanted[10:30, 10:30] = True  # 400
    made[20:40, 10:30] = True  # 400, of which 200 in both
    assert overlap(drawing(wanted), drawing(made)) == pytest.approx(200 / 600)
    assert overlap(drawing(wanted), drawing(wanted)) == 1
    assert overlap(drawing(wanted), drawing(~wanted)) == 0


def test_explained_spread_is_the_slow_one():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 256, (4, 5, 3), np.uint8)
    made = np.clip(wanted + rng.integers(-40, 40, (4, 5, 3)), 0, 255).astype(np.uint8)
    error = spread = 0.0
    for channel in range(3):
        mean = sum(int(wanted[y, x, channel]) for y in range(4) for x in range(5)) / 20
        for y in range(4):
            for x in range(5):
                error += (int(made[y, x, channel]) - int(wanted[y, x, channel])) ** 2
                spread += (int(wanted[y, x, channel]) - mean) ** 2
    wanted_score = 1 - math.sqrt(error / 60) / math.sqrt(spread / 60)
    assert 0.3 < wanted_score < 0.9
    assert explained(Image.fromarray(wanted), Image.fromarray(made)) == pytest.approx(wanted_score)


def test_a_flat_map_asks_for_its_color():
    flat = Image.new("RGB", (64, 64), (100, 100, 100))
    assert explained(flat, flat) == 1
    assert explained(flat, Image.new("RGB", (64, 64), (101, 101, 101))) == 0
    assert explained(flat, scene()) == 0


@pytest.mark.parametrize("name", TONES)
def test_an_image_of_one_color_scores_nothing(name):
    wanted = get(name)(scene())
    mean = tuple(int(v) for v in np.asarray(wanted).mean((0, 1)).round())
    for color in (mean, (128, 128, 128), (0, 0, 0)):
        assert agreement(name, wanted, Image.new("RGB", (64, 64), color)) < 1e-4


def test_correlation_is_the_slow_one():
    rng = np.random.default_rng(0)
    wanted, made = (rng.integers(0, 256, (10, 12), np.uint8) for _ in range(2))
    made = (wanted // 2 + made // 2).astype(np.uint8)
    weights = np.array([math.exp(-(k**2) / 2) for k in range(-4, 5)])
    weights /= weights.sum()

    def smoothed(values):
        padded = np.pad(values / 255, 4, mode="edge")
        window = np.outer(weights, weights)
        return [(padded[y : y + 9, x : x + 9] * window).sum() for y in range(10) for x in range(12)]

    slow = np.corrcoef(smoothed(wanted), smoothed(made))[0, 1]
    assert 0.3 < slow < 0.95
    assert correlation(Image.fromarray(wanted), Image.fromarray(made)) == pytest.approx(slow, abs=1e-5)
    assert correlation(Image.fromarray(wanted), Image.fromarray(255 - wanted)) == 0


def test_soft_edges_of_half_the_contrast_are_the_same_edges():
    half = ImageEnhance.Contrast(scene()).enhance(0.5)
    assert agreement("soft_edge", get("soft_edge")(scene()), half) > 0.97


@pytest.mark.parametrize("score", [line_f1, correlation, overlap])
def test_empty_maps(score):
    """Two empty maps agree; an empty one agrees with nothing else, on either side."""
    assert score(BLACK, BLACK) == 1
    assert score(lines(30), BLACK) == 0
    assert score(BLACK, lines(30)) == 0


def test_soft_edges_of_almost_nothing_are_none():
    faint = Image.fromarray(np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8))
    assert correlation(faint, BLACK) == 1
    assert correlation(faint, lines(30)) == 0


@pytest.mark.parametrize("name", computed())
def test_an_image_follows_its_own_map_and_not_another(name):
    images = [disc(centre=(0.3, 0.35), radius=0.22), scene(), disc(centre=(0.7, 0.6), color=SKY, ground=PURPLE)]
    maps = [get(name)(each) for each in images]
    for image, given, other in zip(images, maps, mismatched(maps), strict=True):
        assert agreement(name, given, image) == pytest.approx(1)
        assert agreement(get(name), given, image) == pytest.approx(1)
        assert 0 <= agreement(name, other, image) < 0.5
        assert 0 <= agreement(name, BLACK, image) < 0.01


@pytest.mark.parametrize("name", computed())
def test_scores_fall_as_the_image_moves_away(name):
    """By one pixel, five, and a quarter of the side; only edges tolerate one pixel."""
    still = agreement(name, get(name)(disc()), disc())
    moved = [agreement(name, get(name)(disc()), disc(centre=(0.5 + by / 64, 0.5))) for by in (1, 5, 16)]
    assert moved == sorted(moved, reverse=True)
    assert moved[2] < 0.5 < moved[0] <= still
    assert (moved[0] > 0.97) == (name in ("canny", "scribble"))


def test_conditions_without_metric_are_errors():
    with raises(UnknownName, name="cany", kind="condition", close=("canny",)):
        agreement("cany", BLACK, BLACK)
    with raises(OptionError, option="condition", given="pairs", expected=tuple(computed())):
        agreement("pairs", BLACK, BLACK)
    with raises(OptionError, option="wanted_map", given=(64, 64), expected=(64, 32)):
        agreement("grey", BLACK, BLACK.crop((0, 0, 64, 32)))


@pytest.mark.parametrize("count", range(2, 12))
def test_wrong_maps_are_all_anothers(count):
    items = list(range(count))
    others = mismatched(items)
    assert sorted(others) == items
    assert all(one != other for one, other in zip(items, others, strict=True))
    assert mismatched(items) == others


@pytest.mark.parametrize("count", [0, 1])
def test_one_map_cannot_be_wrong(count):
    with raises(OptionError, option="maps", given=count, expected=2):
        mismatched([None] * count)
