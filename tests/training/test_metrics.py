"""Metrics against explicit sums, on a real tiny CLIP."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from tests.raising import raises
from tests.training.clips import Bundled, random_image
from veneer.injection.errors import VeneerError
from veneer.training.report import metrics
from veneer.training.report.feature_models import Features, from_clip
from veneer.training.report.metrics import (
    MeanInterval,
    compare_paired,
    difference,
    layout,
    mean_interval,
    measure,
    pixel_distance,
    prompt_distance,
    t_quantile,
)
from veneer.training.report.previews import PreviewPair


@pytest.fixture(scope="module")
def clip():
    return from_clip(Bundled(), "tiny CLIP")


# intervals


@pytest.mark.parametrize(("freedom", "published"), [(1, 12.706), (5, 2.571), (11, 2.201), (20, 2.086), (30, 2.042), (120, 1.980)])
def test_t_quantile_is_the_published_table(freedom, published):
    assert t_quantile(freedom) == pytest.approx(published, abs=5e-4)


def test_figure_is_the_textbook_interval():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.n) == (2.5, 4)
    assert found.low == pytest.approx(2.5 - half)
    assert found.high == pytest.approx(2.5 + half)


def test_the_interval_covers_the_truth_19_times_in_20():
    draws = np.random.default_rng(0).normal(0.3, 1.0, (2000, 6))
    inside = np.mean([(f := mean_interval(row)).low <= 0.3 <= f.high for row in draws])
    assert 0.935 < inside < 0.965


def test_one_value_has_no_interval_and_none_is_refused():
    assert mean_interval([0.5]) == MeanInterval(0.5, None, None, 1)
    assert str(mean_interval([0.5])) == "0.500 (n = 1)"
    for bad in ([], [1.0, float("nan")]):
        with raises(VeneerError, expected="finite"):
            mean_interval(bad)


def test_paired_differences_see_what_the_two_intervals_hide():
    base = [0.1, 0.5, 0.9, 0.3]
    found = compare_paired([b + 0.05 + 0.001 * i for i, b in enumerate(base)], base)
    assert found.clear
    assert found.adapted.low < found.base.high
    assert not compare_paired(base, base).clear


# metrics


def test_metrics_equal_explicit_sums(clip):
    photos, images = [random_image(i) for i in range(3)], [random_image(10 + i) for i in range(4)]
    concept = [PreviewPair("a <toy> dog", i, random_image(20 + i), p) for i, p in enumerate(images)]
    unrelated = [PreviewPair("a car", i, random_image(30 + i), random_image(40 + i)) for i in range(2)]
    found = measure(clip, photos, concept, unrelated, {"<toy>": "toy"})

    def f(x):
        return clip.images([x])[0]

    table = [[float(f(g) @ f(p)) for p in photos] for g in images]
    assert found.similarity.adapted.mean == pytest.approx(np.mean(table), abs=1e-6)
    assert found.nearest.adapted.mean == pytest.approx(np.mean([max(row) for row in table]), abs=1e-6)
    text = clip.texts(["a toy dog"])[0]
    assert found.prompt_similarity.adapted.mean == pytest.approx(np.mean([float(f(g) @ text) for g in images]), abs=1e-6)
    pairs = [float(f(photos[i]) @ f(photos[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.ceiling.mean == pytest.approx(np.mean(pairs), abs=1e-6)
    drift = [1 - float(f(u.base) @ f(u.adapted)) for u in unrelated]
    assert found.drift.mean == pytest.approx(np.mean(drift), abs=1e-6)
    assert found.similarity.gain.mean == pytest.approx(found.similarity.adapted.mean - found.similarity.base.mean, abs=1e-6)
    assert json.loads(json.dumps(found.as_dict()))["similarity"]["gain"]["n"] == 4
    columns = [re.split(r"\s{2,}", line) for line in str(found).splitlines()[1:4]]
    assert [row[0] for row in columns] == ["similarity", "nearest", "prompt similarity"]
    assert {len(row) for row in columns} == {4}, "the image grid splits columns at two spaces"
    assert "prompt similarity" in str(found)


def test_similarity_rises_for_learned_photos_only(clip):
    photos = [random_image(i) for i in range(3)]
    other = [random_image(50 + i) for i in range(6)]
    learned = [PreviewPair("x", i, other[i], photos[i % 3]) for i in range(6)]
    same = [PreviewPair("x", i, other[i], other[i]) for i in range(6)]
    assert measure(clip, photos, learned, same).similarity.clear
    assert measure(clip, photos, learned, same).nearest.adapted.mean == pytest.approx(1, abs=1e-5)
    nothing = measure(clip, photos, same, same)
    assert not nothing.similarity.clear
    assert nothing.drift.mean == pytest.approx(0, abs=1e-6)
    assert nothing.pixel_drift.mean == 0


def test_pixel_distance_is_rms():
    black, white, half = (Image.new("RGB", (4, 4), c) for c in ("black", "white", (51, 51, 51)))
    assert pixel_distance(black, white) == 1
    assert pixel_distance(black, half) == pytest.approx(0.2)


def test_without_text_model_or_unrelated_prompts_those_metrics_are_none(clip):
    blind = Features("blind", clip.preprocess, clip.of_pixels)
    found = measure(blind, [random_image(0)], [PreviewPair("x", 0, random_image(1), random_image(2))])
    assert found.prompt_similarity is found.drift is found.pixel_drift is found.ceiling is None
    assert "drift" not in str(found)
    json.dumps(found.as_dict())


def test_nothing_to_compare_is_refused(clip):
    with raises(VeneerError, where="photos", given=(0, 1)):
        metrics.measure(clip, [], [PreviewPair("x", 0, random_image(1), random_image(2))])


def colored(color, prompt, seed, adapted=None):
    images = [Image.new("RGB", (16, 16), c) for c in (color, color if adapted is None else adapted)]
    return PreviewPair(prompt, seed, *images)


def test_layout_is_the_distance_to_other_prompts_less_that_to_ones_own():
    """Black and white backgrounds; the adapted images follow, follow halfway, or are all gray."""
    for black, white, expected in (((0,) * 3, (255,) * 3, 1.0), ((51,) * 3, (204,) * 3, 0.6), ((102,) * 3, (102,) * 3, 0.0)):
        found = layout([colored(c, p, s, a) for p, c, a in (("b", (0,) * 3, black), ("w", (255,) * 3, white)) for s in (0, 1)])
        assert found.base.mean == pytest.approx(1.0)
        assert found.adapted.mean == pytest.approx(expected)


def test_layout_needs_two_prompts_and_two_images_of_each():
    assert layout([colored((0,) * 3, "b", seed) for seed in (0, 1)]) is None
    assert layout([colored((0,) * 3, "b", 0), colored((255,) * 3, "w", 0)]) is None


def test_distance_of_unrelated_prompts(clip):
    pairs = [
        PreviewPair(prompt, seed, random_image(i), random_image(i + 9))
        for i, (prompt, seed) in enumerate([("a", 0), ("a", 1), ("b", 0)])
    ]
    base = clip.images([pair.base for pair in pairs])
    expected = (2 - float(base[0] @ base[2]) - float(base[1] @ base[2])) / 2
    assert prompt_distance(clip, pairs) == pytest.approx(expected, abs=1e-5)
    assert prompt_distance(clip, pairs[:2]) is None


def test_difference_of_two_samples_is_the_welch_interval():
    found = difference([1.0, 2.0, 3.0], [5.0, 5.0])
    half = 4.3026527 * math.sqrt(1 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((-3.0, -3 - half, -3 + half))
