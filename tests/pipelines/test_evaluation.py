"""How much a personalization run evaluates, and by which feature model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from veneer.pipelines.personalize import PersonalizeConfig, personalize

from veneer.training.evaluation.local_features import OFF
from veneer.training.evaluation.plan import QUICK_PROMPTS

PROMPTS, DRIFT = ("a {concept}", "the {concept}", "my {concept}"), ("a dog", "a car", "a house")


def run(base: Any, photos: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """The result of a run, with the number of images in its last line of the phase `evaluating`."""
    options: dict[str, Any] = {
        "concept": "<toy>", "class_word": "cat", "steps": 2, "tracker": "none", "prompts": PROMPTS, "drift_prompts": DRIFT,
    }  # fmt: skip
    personalize(PersonalizeConfig(photos=photos, base=base("sd"), out=out, **{**options, **settings}))
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines() if line]
    images = [line["done"] for line in lines if line["phase"] == "evaluating"]
    return {**json.loads((out / "result.json").read_text()), "images": images[-1] if images else 0}


def test_none_generates_no_image(base: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(base, photos, tmp_path / "out", eval="none", features="bundled")
    assert (found["images"], found["metrics"], found["samples"], found["verdict"]["outcome"]) == (0, None, [], "unknown")
    assert not list((tmp_path / "out").rglob("*.png"))
    assert "before_after.png" not in capsys.readouterr().out


def test_a_quick_evaluation_measures_one_image_for_each_of_a_few_prompts(base: Any, photos: Path, tmp_path: Path) -> None:
    found = run(base, photos, tmp_path / "out", eval="quick", features="bundled")
    assert found["images"] == 2 * 2 * QUICK_PROMPTS
    assert found["metrics"]["similarity"]["adapted"]["n"] == QUICK_PROMPTS
    assert (tmp_path / "out" / "before_after.png").is_file()


def test_another_base_model_is_evaluated_in_proportion_and_without_the_bundled_clip(
    base: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of 25 denoising steps take longer than a quarter of two training steps."""
    found = run(base, photos, tmp_path / "out")
    assert (found["config"]["eval"], found["config"]["features"], found["config"]["eval_seeds"]) == ("auto", OFF, 0)
    assert found["images"] < 2 * len(PROMPTS)
    assert "evaluation: " in capsys.readouterr().out
    assert found["metrics"] is None


def test_a_number_of_images_is_a_request(base: Any, photos: Path, tmp_path: Path) -> None:
    found = run(base, photos, tmp_path / "out", eval_seeds=1, features="bundled")
    assert found["config"]["eval"] == "full"
    assert found["images"] == 2 * (len(PROMPTS) + len(DRIFT))


def test_without_a_feature_model_there_is_a_grid_and_advice(base: Any, photos: Path, tmp_path: Path) -> None:
    found = run(base, photos, tmp_path / "out", eval="full", features=OFF)
    assert found["images"] == 2 * len(PROMPTS)
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert any("--features" in advice for advice in found["verdict"]["advice"])
