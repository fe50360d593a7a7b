"""Code in model cards, by the pipeline of the base model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest

import veneer
from tests.training.transformer_families.tiny import PIPELINES as TRANSFORMERS
from tests.training.transformer_families.tiny import tiny as tiny_transformer
from tests.training.video_families.tiny import tiny as tiny_video
from veneer.publishing.card_data import NO_LOADER, CardFacts
from veneer.publishing.run_record import RunRecord
from veneer.publishing.usage import usage_sections
from veneer.training.families import families

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' UniPC solver


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "longcat_image", "auraflow"])
def test_the_call_generates_one_image_of_the_prompt(name: str, tmp_path: Path) -> None:
    pipe: Any = (tiny_transformer if name in TRANSFORMERS else tiny_video)(name)
    veneer.attach(pipe, "lora", rank=2).save(tmp_path / "adapter.safetensors")
    record = {"config": {"base": "owner/base", "concept": "<toy>", "method": "lora"}, "methods": ["lora"]}
    facts = CardFacts(RunRecord(tmp_path, "personalize", record), "user/toy", None, {"pytorch_lora_weights.safetensors": 1})
    sections = list(usage_sections(facts))
    calls = {line for section in sections for line in section.splitlines() if line.startswith("image = ")}
    assert len(calls) == 1
    assert len(sections) == (1 if name == "longcat_image" else 2)
    scope: dict[str, Any] = {"pipe": partial(pipe, height=32, width=48, num_inference_steps=1)}
    exec(calls.pop(), scope)
    assert scope["image"].size == (48, 32)


@pytest.mark.parametrize("name", families())
def test_pipelines_without_a_loader_of_lora(name: str) -> None:
    pipeline = getattr(diffusers, families()[name].pipelines[0])
    transformer = pipeline.__init__.__annotations__.get("transformer")
    expected = str(transformer).rpartition(".")[2].removesuffix("'>").startswith(NO_LOADER)
    assert hasattr(pipeline, "load_lora_weights") is not expected
