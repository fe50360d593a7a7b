"""The default evaluation fits the time of the training, and the feature model fits the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.training.evaluation.fields import EvaluationFields
from veneer.training.evaluation.local_features import CACHED, OFF, WEIGHTS, default_features
from veneer.training.evaluation.plan import SHARE, affordable_plan, plan

PROMPTS, DRIFT = ("a", "b", "c", "d"), ("e", "f", "g")


def test_the_full_evaluation_has_all_prompts_with_and_without_the_adapter() -> None:
    full = plan("full", 3, PROMPTS, DRIFT)
    assert (full.prompts, full.drift_prompts) == (PROMPTS, DRIFT)
    assert full.images() == 2 * 3 * (4 + 3)


def test_without_seeds_there_is_a_grid_without_metrics() -> None:
    assert plan("full", 0, PROMPTS, DRIFT).images() == 2 * 4
    assert plan("quick", 0, PROMPTS, DRIFT).images() == 2 * 2


def test_a_quick_evaluation_has_one_image_for_each_of_two_and_two_prompts() -> None:
    quick = plan("quick", 3, PROMPTS, DRIFT)
    assert (quick.seeds, quick.prompts, quick.drift_prompts, quick.images()) == (1, PROMPTS[:2], DRIFT[:2], 8)


def test_each_concept_has_all_prompts() -> None:
    assert plan("full", 3, PROMPTS, DRIFT).images(2) == 2 * 3 * (2 * 4 + 3)
    assert affordable_plan(plan("full", 1, PROMPTS, DRIFT), 100, 100 * SHARE / 15, 2).kind == "quick"


def test_none_generates_nothing() -> None:
    assert plan("none", 3, PROMPTS, DRIFT).images() == 0


@pytest.mark.parametrize(("image_seconds", "kind"), [(0.0, "full"), (1.0, "full"), (2.0, "quick"), (6.0, "none")])
def test_the_default_is_the_largest_that_takes_a_quarter_of_the_training_at_most(image_seconds: float, kind: str) -> None:
    chosen = affordable_plan(plan("full", 3, PROMPTS, DRIFT), training_seconds=42 / SHARE, image_seconds=image_seconds)
    assert chosen.kind == kind
    assert chosen.images() * image_seconds <= 42
    assert bool(chosen.reason) == (kind != "full")


def test_the_bundled_base_model_is_judged_by_the_bundled_clip() -> None:
    assert default_features("bundled") == "bundled"


def test_another_base_model_is_judged_by_a_model_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert default_features("stabilityai/sdxl") == OFF
    names = list(CACHED)
    for name in (names[-1], names[0]):
        folder = tmp_path / f"models--{CACHED[name].replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / WEIGHTS).write_bytes(b"")
        assert default_features("stabilityai/sdxl") == name


@pytest.mark.parametrize(("kind", "seeds", "limit"), [("quick", 5, 1), ("none", 1, 0)])
def test_more_images_than_the_evaluation_has_are_an_error(kind: Any, seeds: int, limit: int) -> None:
    with raises(OptionError, option="eval_seeds", given=seeds, expected=limit):
        EvaluationFields(eval=kind, eval_seeds=seeds).evaluation_defaults("bundled")


@pytest.mark.parametrize(("kind", "seeds"), [("quick", 1), ("none", 0), ("full", 3), (None, 3)])
def test_defaults_can_be_given_again(kind: Any, seeds: int) -> None:
    found = EvaluationFields(eval=kind).evaluation_defaults("bundled")
    assert (found["eval"], found["eval_seeds"]) == (kind or "full", seeds)
    assert EvaluationFields(**found).evaluation_defaults("bundled") == found
