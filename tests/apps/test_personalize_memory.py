"""Predicted memory on the page Train, against the free memory of the machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from veneer.apps.pages.personalize.memory import config_of, predict_memory

from tests.apps.test_personalize_config import request
from tests.raising import raises
from veneer.injection import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.preflight import memory_check
from veneer.training.preflight.memory_check import check_memory
from veneer.training.preflight.memory_size import Capacity


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("memory") / "base"
    tiny_pipeline("sd").save_pretrained(folder)
    return str(folder)


def at(base: str, **settings: Any) -> Any:
    form = request(resolution="64", batch="1", **settings)
    return type(form)("", "", base, form.method, form.settings, form.options)


def test_config_is_that_of_the_command() -> None:
    form = request(
        "pivotal", quantize="nf4", batch="3", gradient_checkpointing=True, offload_encoders=False, options={"rank": "8"}
    )
    config = config_of(form, "cpu")
    assert (config.quantize, config.batch, config.gradient_checkpointing) == (("nf4",), 3, True)
    assert (config.offload_encoders, config.check, config.options["lora"]) == (False, "cpu", {"rank": 8})
    assert config.photos == Path("photos")


def test_prediction_follows_the_quantization(base: str) -> None:
    plain, quantized = (predict_memory(at(base, quantize=kind), "cpu") for kind in ("default", "int8"))
    assert "The run fits" in plain
    assert ">int8<" in quantized
    assert ">int8<" not in plain
    assert _peak(quantized) < _peak(plain)
    with raises(OptionError, option="quantize"):
        predict_memory(at(base, quantize="nf5"), "cpu")


def _peak(html: str) -> float:
    peak = re.search(r"unet</td><td>\w+</td><td>([\d.]+) ([KM])iB", html)
    assert peak, html
    return float(peak[1]) * {"K": 1, "M": 1024}[peak[2]]


def test_prediction_is_compared_with_the_machine(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less free memory than the run needs, settings are proposed."""
    needs = check_memory(config_of(at(base), "cpu")).prediction.peak
    monkeypatch.setattr(memory_check, "parse_capacity", lambda text: Capacity(needs - 1, "cpu"))
    said = predict_memory(at(base), "cpu")
    assert "does not fit" in said
    assert "note bad" in said
    monkeypatch.setattr(memory_check, "parse_capacity", lambda text: Capacity(needs, "cpu"))
    assert "note good" in predict_memory(at(base), "cpu")
