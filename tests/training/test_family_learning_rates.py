"""Default learning rates of base models with and without a preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.raising import raises
from veneer import methods
from veneer.base_models import preset
from veneer.base_models.architectures import ARCHITECTURES, PIPELINES
from veneer.injection.errors import BaseModelError
from veneer.training.families import families
from veneer.training.families.flow.sd3 import StableDiffusion3
from veneer.training.families.learning_rates import family_learning_rates
from veneer.training.personalization_config import PersonalizeConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return tmp_path


def rates(base: str, method: str, **options: Any) -> dict[str, float]:
    return PersonalizeConfig(concept="<toy>", base=base, method=method, **options).rates()


@pytest.mark.parametrize("base", ["flux", "sdxl", "sd15", "dit", "owner/model"])
def test_lora_without_a_preset_trains_at_the_rate_of_the_scripts_of_diffusers(base: str) -> None:
    assert rates(base, "lora") == {"lora": 1e-4}
    assert rates(base, "dora") == {"dora": 1e-4}
    assert rates(base, "bitfit") == {"bitfit": methods.get("bitfit").learning_rate}
    assert rates(base, "lora+textual_inversion") == {"lora": 1e-4, "textual_inversion": 5e-3}


def test_every_family_has_a_rate_of_lora() -> None:
    assert {kind.learning_rates["lora"] for kind in families().values()} == {1e-4}


def test_a_family_has_its_own_rate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion3, "learning_rates", {"lora": 3e-4})
    assert rates(str(folder), "lora") == {"lora": 3e-4}
    assert rates("flux", "lora") == {"lora": 1e-4}


def test_a_preset_or_an_option_comes_first(folder: Path) -> None:
    (folder / "veneer.json").write_text(json.dumps({"training": {"lora": {"learning_rate": 0.02}}}))
    assert rates(str(folder), "lora") == {"lora": 0.02}
    assert rates(str(folder), "dora") == {"dora": methods.get("dora").learning_rate}  # the preset knows the base model
    assert rates(str(folder), "lora", learning_rate=0.5) == {"lora": 0.5}
    (folder / "veneer.json").write_text(json.dumps({"steps": 4}))
    assert rates(str(folder), "lora") == {"lora": 1e-4}
    assert rates("bundled", "lora") == {"lora": preset("bundled").training["lora"]["learning_rate"]} == {"lora": 0.002}
    assert rates("bundled", "ssf") == {"ssf": methods.get("ssf").learning_rate}


def test_no_such_base_model(tmp_path: Path) -> None:
    with raises(BaseModelError, where="base", given=str(tmp_path / "missing")):
        family_learning_rates(str(tmp_path / "missing"))


@pytest.mark.parametrize("base", sorted(ARCHITECTURES.keys() - PIPELINES.keys()))
def test_an_architecture_without_a_pipeline_is_no_base_model(base: str) -> None:
    with raises(BaseModelError, where="kind", given=base):
        rates(base, "lora")
