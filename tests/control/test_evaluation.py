"""Means of agreements, and intervals over subjects, whose seeds are averaged."""

from __future__ import annotations

import math
from statistics import stdev

import numpy as np
import pytest
from PIL import Image

from veneer.control.evaluation import ControlSamples, Subject, measure_samples
from veneer.control.map_agreement import agreement
from veneer.control.maps import maps

KINDS = ("followed", "free", "misled")


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_seeds_of_a_subject_are_averaged_before_the_interval() -> None:
    condition = maps.get("blur")
    subjects = [Subject("", image(n), condition(image(n))) for n in range(3)]
    half = [Image.blend(s.image, image(9), 0.5) for s in subjects]
    drawings = [
        ControlSamples(s, subjects[n - 1], seed, Image.blend(s.image, half[n], seed / 2), half[n], image(20 + 2 * n + seed))
        for n, s in enumerate(subjects)
        for seed in (0, 1)
    ]
    found = measure_samples(drawings, condition)
    scores = {kind: [agreement(condition, d.subject.map, getattr(d, kind)) for d in drawings] for kind in KINDS}
    for kind in KINDS:
        assert getattr(found, kind) == pytest.approx(sum(scores[kind]) / 6)
    for kind, (mean, interval) in (("free", found.over_free), ("misled", found.over_misled)):
        apart = [(sum(scores["followed"][i : i + 2]) - sum(scores[kind][i : i + 2])) / 2 for i in (0, 2, 4)]
        assert mean == pytest.approx(sum(apart) / 3)
        assert interval == pytest.approx(1.96 * stdev(apart) / math.sqrt(3))
    assert found.count == 6
    assert found.followed > found.free > found.misled


def test_one_subject_has_no_interval() -> None:
    condition = maps.get("blur")
    subject = Subject("", image(0), condition(image(0)))
    found = measure_samples([ControlSamples(subject, subject, seed, *[image(0)] * 3) for seed in (0, 1)], condition)
    assert found.over_free == (0.0, math.inf)
    assert found.as_dict()["over_free"] == [0.0, None]
