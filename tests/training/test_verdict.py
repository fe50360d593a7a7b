"""Verdicts of runs: pure functions of scores."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.report.metrics import compute_metrics
from veneer.classification.report.verdict import Evidence
from veneer.classification.report.verdict import verdict as transfer_verdict
from veneer.control.config import ControlConfig
from veneer.control.evaluation import ControlMetrics
from veneer.control.verdict import loss_trend
from veneer.control.verdict import verdict as control_verdict
from veneer.injection.errors import OptionError
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.report.metrics import MeanInterval, Metrics, PairedMetric
from veneer.training.report.personalization_verdict import MORE_IMAGES, personal_verdict, similarity_share
from veneer.training.report.verdict import WORDS, Verdict

CONFIG = PersonalizeConfig(photos=Path("photos"), concept="<x>", steps=100, out=Path("out"))


def around(mean: float, half: float, n: int = 12) -> MeanInterval:
    return MeanInterval(mean, mean - half, mean + half, n)


def pair(adapted: float, base: float, half: float) -> PairedMetric:
    return PairedMetric(around(adapted, half), around(base, half), around(adapted - base, half))


OCTOPUS = Metrics(
    "bundled CLIP", pair(0.644, 0.042, 0.12), pair(0.724, 0.109, 0.11), pair(0.052, 0.434, 0.056), around(0.817, 0.02),
    around(0.405, 0.11), around(0.17, 0.02), 0.965, pair(0.323, 0.479, 0.023),
)  # fmt: skip
"""Measured: the photos of the package, default settings; the images show an octopus where the prompts say."""
CAR = Metrics(
    "bundled CLIP", pair(0.12, 0.09, 0.35), pair(0.2, 0.2, 0.3), pair(-0.02, 0.40, 0.3), around(0.5, 0.1),
    around(0.1, 0.05), around(0.1, 0.02), 0.965, pair(0.4, 0.45, 0.1),
)  # fmt: skip
"""Measured: five photos of a toy car, 100 steps of pivotal tuning, one image a prompt: a brown blob."""


SNEAKER = Metrics(
    "bundled CLIP", pair(0.158, 0.037, 0.093), pair(0.334, 0.141, 0.124), pair(0.038, 0.187, 0.109), around(0.276, 0.12),
    around(0.173, 0.1), around(0.096, 0.008), 0.965, pair(0.4, 0.49, 0.01),
)  # fmt: skip
"""Measured: six photos of a shoe, 100 steps of pivotal tuning: its colors without its shape, where the base generates a shoe."""


CAT = Metrics(
    "bundled CLIP", pair(0.032, -0.051, 0.076), pair(0.165, 0.03, 0.049), pair(-0.1, 0.451, 0.043), around(0.29, 0.127),
    around(0.759, 0.1), around(0.237, 0.017), 0.965, pair(0.4, 0.49, 0.01),
)  # fmt: skip
"""Measured: five photos of a cat, 300 steps of LoRA: gray shapes, and fish and houses changed as well."""


QUICK = dataclasses.replace(OCTOPUS, similarity=pair(0.63, 0.05, 0.34), prompt_similarity=pair(0.05, 0.43, 0.1), layout=None)
"""The same run as `OCTOPUS`, one image a prompt: good, and too few images to be sure."""


BOWL = Metrics(
    "bundled CLIP", pair(0.057, -0.111, 0.16), pair(0.135, -0.08, 0.2), pair(0.103, 0.087, 0.07), around(0.76, 0.04),
    around(0.33, 0.183), around(0.13, 0.03), 0.97, pair(0.4, 0.5, 0.1),
)  # fmt: skip
"""Measured: five photos of a bowl, 100 steps of pivotal tuning, two images a prompt: dark blobs."""


def changed(metrics: Metrics, **parts: object) -> Metrics:
    return dataclasses.replace(metrics, **parts)


def test_a_verdict_is_json_and_text():
    verdict = Verdict("partly", "A little.", ("One.",), ("--steps 9",))
    assert json.loads(json.dumps(verdict.as_dict())) == {
        "outcome": "partly", "summary": "A little.", "reasons": ["One."], "advice": ["--steps 9"],
    }  # fmt: skip
    assert all(part in verdict.text() for part in ("partly", "A little.", "One.", "--steps 9"))
    assert set(WORDS) == {"learned", "partly", "not_learned", "overfitted", "unknown"}
    with raises(OptionError, option="outcome", given="great", expected=tuple(WORDS)):
        Verdict("great", "")


@pytest.mark.parametrize(
    ("metrics", "outcome"),
    [
        (OCTOPUS, "learned"),
        (CAR, "not_learned"),
        (SNEAKER, "overfitted"),
        (CAT, "not_learned"),
        (BOWL, "not_learned"),
        (QUICK, "partly"),
        (changed(SNEAKER, prompt_similarity=pair(0.15, 0.187, 0.02)), "partly"),
        (changed(SNEAKER, prompt_similarity=pair(0.038, 0.187, 0.2)), "partly"),
        (changed(OCTOPUS, similarity=pair(0.25, 0.04, 0.1), prompt_similarity=None), "partly"),
        (changed(OCTOPUS, similarity=pair(0.5, 0.04, 0.1), prompt_similarity=None), "partly"),
        (changed(OCTOPUS, ceiling=None, prompt_similarity=None), "partly"),
        (changed(OCTOPUS, ceiling=around(0.03, 0.01)), "learned"),
        (changed(OCTOPUS, layout=pair(0.2, 0.479, 0.05)), "overfitted"),
        (changed(OCTOPUS, layout=pair(-0.03, 0.01, 0.02)), "learned"),
        (changed(OCTOPUS, drift=around(0.6, 0.1)), "overfitted"),
        (changed(OCTOPUS, drift=around(0.55, 0.1)), "learned"),
        (changed(OCTOPUS, drift=around(0.6, 0.1), unrelated_distance=None), "learned"),
        (changed(OCTOPUS, similarity=pair(0.6, 0.04, 0.6), prompt_similarity=None), "unknown"),
        (changed(OCTOPUS, similarity=pair(0.6, 0.04, 0.6)), "unknown"),
        (changed(OCTOPUS, similarity=pair(0.4, 0.04, 0.6)), "not_learned"),
        (changed(CAR, prompt_similarity=None, drift=None, layout=None), "not_learned"),
        (None, "unknown"),
    ],
)
def test_personalization(metrics, outcome):
    found = personal_verdict(metrics, CONFIG)
    assert found.outcome == outcome
    assert found.reasons
    assert bool(found.advice) == (outcome != "learned")


def test_a_layout_that_may_be_lost_is_not_called_kept():
    kept, unclear = (personal_verdict(changed(OCTOPUS, layout=pair(mean, 0.479, 0.3)), CONFIG) for mean in (0.3, 0.2))
    assert kept.outcome == unclear.outcome == "learned"
    assert kept.advice == ()
    assert unclear.advice == (MORE_IMAGES,)
    assert kept.summary != unclear.summary


def test_one_image_is_too_few():
    one = MeanInterval(0.5, None, None, 1)
    found = personal_verdict(changed(OCTOPUS, similarity=PairedMetric(one, one, one)), CONFIG)
    assert (found.outcome, found.advice) == ("unknown", ("evaluate more images: --eval-seeds 3",))


def test_share_of_the_distance():
    assert similarity_share(OCTOPUS) == pytest.approx(0.602 / (0.817 - 0.042))
    assert similarity_share(changed(OCTOPUS, ceiling=None)) is None


def test_advice_names_flags_of_the_command():
    few = personal_verdict(CAR, CONFIG).advice
    assert any("--steps 300" in line for line in few)
    assert any("--class-word" in line for line in few)
    assert not any(
        "--class-word" in line
        for line in personal_verdict(CAR, dataclasses.replace(CONFIG, class_word="car", class_images=9)).advice
    )
    long = personal_verdict(
        changed(OCTOPUS, similarity=pair(0.25, 0.04, 0.1), prompt_similarity=None), dataclasses.replace(CONFIG, steps=400)
    ).advice
    assert any("--steps 800" in line for line in long)


# control

CONTROL = ControlConfig(steps=100, generated_images=64).with_defaults()
FALLING, RISING = [1.0 - 0.005 * i for i in range(100)], [0.3 + 0.005 * i for i in range(100)]


def control_metrics(
    over_free: tuple[float, float], over_misled: tuple[float, float] = (0.3, 0.05), free: float = 0.2
) -> ControlMetrics:
    return ControlMetrics("agreement (canny)", free + over_free[0], free, 0.1, over_free, over_misled, 38)


@pytest.mark.parametrize(
    ("metrics", "losses", "outcome"),
    [
        (control_metrics((0.388, 0.06)), FALLING, "learned"),
        (control_metrics((0.388, 0.06)), RISING, "partly"),
        (control_metrics((0.388, 0.06)), [], "learned"),
        (control_metrics((0.046, 0.02)), FALLING, "partly"),
        (control_metrics((0.046, 0.06), (0.05, 0.06)), FALLING, "not_learned"),
        (control_metrics((0.388, 0.06), (-0.1, 0.2)), FALLING, "not_learned"),
        (control_metrics((-0.1, 0.05)), FALLING, "not_learned"),
        (control_metrics((0.388, math.inf)), FALLING, "unknown"),
        (None, FALLING, "unknown"),
    ],
)
def test_control(metrics, losses, outcome):
    found = control_verdict(metrics, losses, CONTROL)
    assert found.outcome == outcome
    assert found.reasons


def test_control_advice():
    worse = control_verdict(control_metrics((-0.1, 0.05)), RISING, CONTROL).advice
    assert [
        any(flag in line for line in worse) for flag in ("--learning-rate 0.0005", "--steps 800", "--generated-images 384")
    ] == [True] * 3


def test_loss_trend_is_the_welch_interval():
    found = loss_trend([1.0] * 8 + [5.0] * 16 + [0.5, 0.7] * 4)
    assert found is not None
    assert found.mean == pytest.approx(-0.4)
    assert found.high == pytest.approx(-0.4 + 2.3646243 * math.sqrt(8 * 0.01 / 7 / 8))
    assert loss_trend([1.0] * 31) is None


# classification


def scores(right: int, of: int, classes: int = 2):
    labels = torch.arange(of) % classes
    answers = torch.where(torch.arange(of) < right, labels, (labels + 1) % classes)
    return compute_metrics(torch.nn.functional.one_hot(answers, classes).double(), labels)


def answers(right: int, of: int) -> list[int]:
    return [1] * right + [0] * (of - right)


@pytest.mark.parametrize(
    ("evidence", "outcome"),
    [
        (Evidence(scores(90, 100), scores(45, 50)), "learned"),
        (Evidence(scores(55, 100), scores(45, 50)), "not_learned"),
        (Evidence(scores(90, 100), scores(45, 50), scores(100, 100), answers(70, 100), answers(90, 100)), "learned"),
        (Evidence(scores(70, 100), scores(35, 50), scores(100, 100), answers(90, 100), answers(70, 100)), "overfitted"),
        (Evidence(scores(70, 100), scores(35, 50), scores(75, 100), answers(90, 100), answers(70, 100)), "partly"),
        (Evidence(scores(70, 100), scores(35, 50), scores(75, 100), answers(72, 100), answers(70, 100)), "learned"),
    ],
)
def test_classification(evidence, outcome):
    found = transfer_verdict(evidence, TransferConfig())
    assert found.outcome == outcome
    assert found.reasons


@pytest.mark.parametrize(("model", "expected"), [("bundled", 1), ("bundled_clip", 0)])
def test_advice_names_another_model(model: str, expected: int) -> None:
    found = transfer_verdict(Evidence(scores(55, 100), scores(45, 50)), TransferConfig(model=model, learning_rate=0.1))
    assert sum("bundled_clip" in line for line in found.advice) == expected
    assert "a lower learning rate: --learning-rate 0.033" in found.advice


def test_advice_names_no_flag_that_is_set() -> None:
    evidence = Evidence(scores(70, 100), scores(35, 50), scores(75, 100), answers(90, 100), answers(70, 100))
    advice = {lp_ft: transfer_verdict(evidence, TransferConfig(lp_ft=lp_ft)).advice for lp_ft in (False, True)}
    assert [sum("--lp-ft" in line for line in lines) for lines in advice.values()] == [1, 0]
    assert set(advice[True]) < set(advice[False])


@pytest.mark.parametrize(("epochs", "advised"), [(1, 20), (20, 40)])
def test_a_short_classifier_is_advised_to_train_for_the_default_number_of_epochs(epochs: int, advised: int) -> None:
    evidence = Evidence(scores(70, 100), scores(35, 50), scores(75, 100), answers(90, 100), answers(70, 100))
    assert f"train longer: --epochs {advised}" in transfer_verdict(evidence, TransferConfig(epochs=epochs)).advice
