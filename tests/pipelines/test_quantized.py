"""Commands on quantized base models: training, generation, what is recorded, and options that do not go together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from veneer.pipelines.control import ControlConfig
from veneer.pipelines.generate import GenerateConfig, generate
from veneer.pipelines.personalize import PersonalizeConfig, personalize

from tests.base_models.quantized import needs
from tests.raising import raises
from tests.training.images import save
from veneer.control.generation import ControlGenerateConfig
from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.training.loop.checkpoints import CheckpointError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QUICK: dict[str, Any] = {
    "concept": "<toy>", "class_word": "cat", "steps": 2, "eval_seeds": 0, "tracker": "none", "checkpoint_every": 1,
    "prompts": ("a {concept}",), "quantize": ("unet=nf4-dq", "text_encoder=int8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on the quantized bundled base model."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "photos").mkdir()
    for i in range(3):
        save(folder / "photos" / f"{i}.png", 48, 40, seed=i)
    return personalize(PersonalizeConfig(photos=folder / "photos", out=folder / "run", text_encoder=True, **QUICK))


def header(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["veneer"])


def test_the_file_records_the_quantization_of_each_tower(trained: Path) -> None:
    found = header(trained / "adapter.safetensors")["base"]
    assert {name: base["quantization"]["kind"] for name, base in found.items()} == {"unet": "nf4-dq", "text_encoder": "int8"}


@pytest.mark.parametrize("quantize", [(), ("nf4-dq",), pytest.param(("int4",), marks=needs("int4"))])
def test_images_from_the_adapter(quantize: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    config = GenerateConfig(("a <toy>",), (str(trained),), steps=2, quantize=quantize, out=tmp_path)
    first = [path.read_bytes() for path in generate(config)]
    assert len(first) == 1
    assert first == [path.read_bytes() for path in generate(config)]


def test_resuming_needs_the_same_quantization(trained: Path) -> None:
    other = {**QUICK, "quantize": ("unet=int8", "text_encoder=int8"), "steps": 4}
    config = PersonalizeConfig(photos=trained.parent / "photos", out=trained, text_encoder=True, resume=True, **other)
    (trained / "result.json").rename(trained / "result.json.kept")
    try:
        with pytest.raises(CheckpointError):
            personalize(config)
    finally:
        (trained / "result.json.kept").rename(trained / "result.json")


@needs("nf4")
def test_a_method_that_computes_weights(trained: Path, tmp_path: Path) -> None:
    with raises(UnsupportedSite, method="glora") as caught:
        personalize(PersonalizeConfig(photos=trained.parent / "photos", out=tmp_path / "run", method="glora", **QUICK))
    assert {"lora", "dora"} <= {*caught.value.expected}


def test_control_methods_whose_base_weights_train() -> None:
    with raises(OptionError, option="quantize", method="controlnext", given=("nf4",)):
        ControlConfig(method="controlnext", quantize=("nf4",)).with_defaults()
    with raises(OptionError, option="quantize", method="controlnet"):
        ControlConfig(method="controlnet", train=("attn.out",), quantize=("unet=nf4",)).with_defaults()
    ControlConfig(method="controlnet", quantize=("nf4",)).with_defaults()
    ControlConfig(method="controlnext", quantize=("text_encoder=nf4",)).with_defaults()


@pytest.mark.parametrize("config", [PersonalizeConfig, ControlConfig])
def test_unknown_kinds_are_rejected_before_loading(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.base_models.loading.load", None)
    with raises(OptionError, option="quantize", given="nf5"):
        config(quantize=("nf5",)).with_defaults()


@needs("int4")
@pytest.mark.parametrize("config", [PersonalizeConfig, ControlConfig])
def test_kinds_that_do_not_work_under_autocast(config: Any) -> None:
    with raises(OptionError, option="quantize", given="int4") as caught:
        config(quantize=("int4",), mixed_precision="bf16").with_defaults()
    assert "int4" not in caught.value.expected
    assert "nf4" in caught.value.expected


@pytest.mark.parametrize("config", [GenerateConfig, ControlGenerateConfig])
def test_unknown_kinds_are_rejected_before_generating(config: Any) -> None:
    with raises(OptionError, option="quantize", given="nf5"):
        config(("a toy",), quantize=("nf5",))
