"""Generations of iPET: the labels that models give each other, against sets written out, and the schedule of a run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.classifiers import tiny
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.class_prompts._generations import training_sets
from veneer.methods.prompt.class_prompts.pet import PET
from veneer.testing.case import perturb

PATTERNS = ("{}", "a {}.", "my {}")


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(models: int = 3, images: int = 40, classes: int = 3) -> Tensor:
    return 2 * torch.randn(models, images, classes, generator=random(7), dtype=torch.float64)


def test_images_labeled_by_all_other_models() -> None:
    """With d = 3 and 2 + 4 + 6 labeled images, 24 are new in the first generation: 4, 8 and 12, repeated if there are too few."""
    given = logits()
    sets = training_sets(given, [2, 4, 6], 1, 3.0, 1.0, random(0))
    for model, (images, labels) in enumerate(sets):
        others = [given[other] for other in range(3) if other != model]
        predicted = [int((others[0][image] + others[1][image]).argmax()) for image in range(40)]
        assert labels.tolist() == [predicted[image] for image in images]
        assert Counter(labels.tolist()) == {0: 4, 1: 8, 2: 12}
        for label, wanted in enumerate((4, 8, 12)):
            available = predicted.count(label)
            times = Counter(image for image, each in zip(images.tolist(), labels.tolist(), strict=True) if each == label)
            assert max(times.values()) <= -(-wanted // available)
    assert len({tuple(images.tolist()) for images, _ in sets}) == 3
    (later, _), *_ = training_sets(given, [2, 4, 6], 2, 3.0, 1.0, random(0))
    assert len(later) == 12 * 9 - 12


def test_labels_are_not_by_the_model_itself() -> None:
    given, other = logits(), logits()
    other[1] = torch.randn(40, 3, generator=random(8), dtype=torch.float64)
    before, after = (training_sets(each, [2, 4, 6], 1, 3.0, 1.0, random(0)) for each in (given, other))
    predictions = [{tuple(pair) for pair in zip(*(part.tolist() for part in sets[1]), strict=True)} for sets in (before, after)]
    mean = (given[0] + given[2]).argmax(1)
    assert all(mean[image] == label for pairs in predictions for image, label in pairs)
    assert (other.mean(0).argmax(1) != mean).any()


def test_a_random_subset_of_the_others() -> None:
    """A quarter of five other models is one model, at least one of two is one as well."""
    for models, share in ((6, 0.25), (3, 0.1)):
        given = logits(models)
        chosen = set[int]()
        for seed in range(30):
            images, labels = training_sets(given, [3, 3, 3], 1, 2.0, share, random(seed))[0]
            agreeing = [m for m in range(1, models) if torch.equal(given[m].argmax(1)[images], labels)]
            assert agreeing
            chosen |= {agreeing[0]} if len(agreeing) == 1 else set()
        assert chosen == {*range(1, models)}


def test_sampled_in_proportion_to_the_probability() -> None:
    """One of two images, with probabilities 0.9 and 0.6: the first in 60 % of the samples."""
    rows = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.0, 1.0]]).clamp(min=1e-9).log()
    given = torch.stack([rows, rows])
    first = sum(int(training_sets(given, [1, 1], 1, 2.0, 1.0, random(seed))[0][0][0]) == 0 for seed in range(600))
    assert first / 600 == pytest.approx(0.6, abs=0.06)


def test_a_class_that_no_image_has_is_left_out() -> None:
    given = torch.zeros(2, 5, 3)
    given[..., 1] = 1
    for images, labels in training_sets(given, [2, 2, 2], 1, 2.0, 1.0, random(0)):
        assert labels.tolist() == [1, 1]
        assert len(images) == 2
    given[:, :, 0] = 2
    (images, labels), _ = training_sets(given, [0, 4, 0], 1, 2.0, 1.0, random(0))
    assert len(images) == len(labels) == 0
    assert images.dtype == labels.dtype == torch.int64


def test_generations_begin_at_equal_parts_of_the_labeled_steps() -> None:
    method = PET(patterns=PATTERNS, generations=3, labeled_share=0.6)
    assert method.generation_starts(50) == (10, 20)
    assert method.generation_starts(51) == (10, 20)
    assert PET(patterns=PATTERNS).generation_starts(50) == ()
    assert method.schedule_end(50) == 31
    with raises(OptionError, method="pet", option="generations", given=8, expected=9):
        method.generation_starts(14)


def test_a_generation_starts_from_zero_deltas() -> None:
    tuned: Any = attach(tiny(), "pet", patterns=PATTERNS, generations=2)
    perturb(tuned, size=0.3)
    before = {name: adapter.deltas.detach().clone() for name, (_, adapter) in tuned.parts.items() if hasattr(adapter, "deltas")}
    tuned.begin_generation()
    for name, deltas in before.items():
        after = tuned.parts[name][1].deltas
        assert not after[:3].any()
        assert torch.equal(after[3], deltas[3])
        assert deltas[3].any()
    tuned.finalize()
    tuned.begin_generation()
    assert all(torch.equal(tuned.parts[name][1].deltas[0], deltas[3]) for name, deltas in before.items())


@pytest.mark.parametrize(
    ("option", "value", "patterns"),
    [
        ("annotators", 0.0, 3),
        ("annotators", 1.1, 3),
        ("generations", 0, 3),
        ("generations", 2, 1),
        ("growth", 1.0, 3),
        ("growth", float("inf"), 3),
    ],
)
def test_invalid_options(option: str, value: Any, patterns: int) -> None:
    with raises(OptionError, method="pet", option=option, given=value):
        PET(**{"patterns": PATTERNS[:patterns], option: value})
