"""Options that would have no effect, and concepts beside datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.raising import raises
from tests.training.images import save
from veneer.classification.config import TransferConfig
from veneer.injection.errors import OptionError
from veneer.training.concepts.concept import concepts_of
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight.memory_check import check_memory


def config(tmp_path: Path, **options: Any) -> PersonalizeConfig:
    return PersonalizeConfig(photos=tmp_path, concept="<x>", out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"schedule": "cosine", "cycles": 3}, "cycles"),
        ({"schedule": "linear", "power": 2.0}, "power"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio"),
        ({"loss_weighting": "debiased", "min_snr_gamma": 5.0}, "min_snr_gamma"),
    ],
)
def test_an_option_without_effect_is_an_error(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    with raises(OptionError, option=name, given=options[name]):
        config(tmp_path, **options).with_defaults()


def test_an_option_of_another_schedule_is_an_error_for_classifiers() -> None:
    with raises(OptionError, option="power", given=2.0):
        TransferConfig(schedule="cosine", power=2.0).with_defaults()


@pytest.mark.parametrize(("weighting", "expected"), [("none", "min_snr"), ("min_snr_plus_one", "min_snr_plus_one")])
def test_gamma_keeps_the_weighting_that_has_one(weighting: Any, expected: str, tmp_path: Path) -> None:
    objective = config(tmp_path, loss_weighting=weighting, min_snr_gamma=3.0).with_defaults().objective()
    assert (objective.weighting, objective.gamma) == (expected, 3.0)


@pytest.mark.parametrize("concept", ["<a>", "", "<unused>"])
def test_a_dataset_without_a_concept_keeps_that_of_the_run(concept: str, tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
        save(tmp_path / name / "0.png", 32, 32)
    tables = ({"path": str(tmp_path / "x"), "concept": "<b>", "class_word": "dog"}, {"path": str(tmp_path / "y")})
    if concept == "<unused>":
        tables = (tables[0],)
    before = PersonalizeConfig(datasets=tables, concept=concept, class_word="cat" if concept == "<a>" else "", out=tmp_path / "o")
    after = before.with_defaults()
    assert concepts_of(after) == concepts_of(before)
    assert after.concept == ("<a>" if concept == "<a>" else "<b>")
    assert after.class_word == ("cat" if concept == "<a>" else "dog")


def test_memory_is_that_of_the_largest_dataset() -> None:
    small, large = (
        check_memory(
            PersonalizeConfig(check="100GB", resolution=64, dtype="float32", datasets=({"path": "x", "concept": "<a>", **sides},))
        )
        for sides in ({}, {"resolution": [128]})
    )
    assert small.table() != large.table()
