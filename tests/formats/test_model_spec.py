"""Metadata of LoRA files that other tools read: ModelSpec's entries and those of sd-scripts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from veneer import base_models, formats
from veneer.formats import comfyui, diffusers, kohya, lycoris, native
from veneer.formats._io.model_spec import architecture_id
from veneer.testing.pipelines import tiny_pipeline

SAVE = {"kohya": kohya.save, "comfyui": comfyui.save, "diffusers": diffusers.save, "lycoris": lycoris.save}
FACTS = {
    "base": "/models/owner/v1", "concept": "<toy>", "class_word": "toy", "resolution": 64, "photos": 5,
    "prediction_type": "epsilon", "title": "My toy", "trains_token": True,
}  # fmt: skip


def metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return found


def saved(form: str, folder: Path, pipe: str = "sd", facts: dict[str, Any] | None = None) -> Path:
    """A file of one format."""
    model = tiny_pipeline(pipe)
    where = "attn.{q,v}"
    return SAVE[form](veneer.attach(model, "lora", rank=2, where=where), folder / "lora.safetensors", facts)


@pytest.mark.parametrize("form", SAVE)
def test_entries_of_model_spec(form: str, tmp_path: Path) -> None:
    found = metadata(saved(form, tmp_path, facts=FACTS))
    trigger = "<toy>" if form == "diffusers" else "toy"
    comfy = "https://github.com/comfyanonymous/ComfyUI"
    expected = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-diffusion-v1/lora",
        "implementation": comfy if form == "comfyui" else "diffusers",
        "title": "My toy",
        "resolution": "64x64",
        "trigger_phrase": trigger,
        "usage_hint": f"Trigger word: {trigger}",
        "prediction_type": "epsilon",
    }
    assert {k: v for k, v in found.items() if k.startswith("modelspec.") and "hash" not in k} == {
        f"modelspec.{k}": v for k, v in expected.items()
    }
    assert found["ss_output_name"] == "My toy"
    assert json.loads(found["ss_tag_frequency"]) == {"My toy": {trigger: 5}}
    assert (found["ss_base_model_version"], found["ss_v2"], found["ss_sd_model_name"]) == ("sd_v1", "False", "v1")
    assert (found["ss_resolution"], found["ss_num_train_images"]) == ("(64, 64)", "5")


@pytest.mark.parametrize("form", SAVE)
def test_hashes_are_those_of_the_tensors_and_files_have_no_date(form: str, tmp_path: Path) -> None:
    path = saved(form, tmp_path, facts=FACTS)
    data = path.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    found = metadata(path)
    assert (found["modelspec.hash_sha256"], found["sshs_model_hash"]) == (f"0x{digest}", digest)
    assert "modelspec.date" not in found
    dated = metadata(saved(form, tmp_path, facts={**FACTS, "date": "2026-01-02"}))
    assert dated["modelspec.date"] == "2026-01-02"


def test_without_provenance_only_what_the_model_says(tmp_path: Path) -> None:
    found = metadata(saved("kohya", tmp_path))
    assert found["modelspec.title"] == "LoRA"
    assert "ss_output_name" not in found
    assert found["modelspec.resolution"] == "512x512"
    assert not found.keys() & {"modelspec.trigger_phrase", "modelspec.prediction_type", "ss_tag_frequency", "ss_sd_model_name"}
    model = tiny_pipeline("sd")
    attached = veneer.attach(model, "lora", rank=2, where="text/attn.{q,v}")
    only_text = metadata(kohya.save(attached, tmp_path / "toy.safetensors", {"concept": "toy"}))
    assert {key for key in only_text if key.startswith("modelspec.")} == {
        "modelspec.trigger_phrase", "modelspec.usage_hint", "modelspec.hash_sha256",
    }, "the file alone does not tell the architecture"  # fmt: skip


def test_conversion_keeps_the_trigger_word_and_merging_names_its_sources(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    attached = veneer.attach(pipe, "lora", rank=2, where="attn.{q,v}")
    file = native.save(attached, tmp_path / "native", provenance={"concept": "toy", "base": "owner/v1", "resolution": 64})
    attached.detach()
    for form in ("kohya", "comfyui", "diffusers"):
        formats.convert(pipe, file, form, tmp_path / form)
        found = metadata(tmp_path / f"{form}.safetensors")
        assert (found["modelspec.trigger_phrase"], found["modelspec.resolution"]) == ("toy", "64x64")
        assert found["modelspec.title"] == "toy LoRA"
    merged = metadata(saved("kohya", tmp_path, facts={"concept": "toy", "merged": ["a.safetensors", "b.safetensors"]}))
    plain = metadata(saved("kohya", tmp_path, facts={**FACTS, "trains_token": False}))
    assert plain["modelspec.trigger_phrase"] == "<toy>", "without an embedding, the prompts of the training have it as text"
    assert merged["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert "modelspec.trigger_phrase" not in merged


def test_inspection_shows_the_trigger_phrase(tmp_path: Path) -> None:
    assert formats.inspect(saved("kohya", tmp_path, facts=FACTS)).words == ("toy",)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sd15", "stable-diffusion-v1"),
        ("sd21", "stable-diffusion-v2-768-v"),
        ("sdxl", "stable-diffusion-xl-v1-base"),
        ("sd3", "stable-diffusion-3-m"),
        ("sd35", "stable-diffusion-3-5-medium"),
        ("sd35-large", "stable-diffusion-3-5-large"),
        ("flux", "flux-1-dev"),
        ("pixart", None),
        ("chroma", "chroma"),
        ("flux2", "Flux.2-dev"),
        ("flux2-klein-4b", "Flux.2-klein-4b"),
        ("flux2-klein-9b", "Flux.2-klein-9b"),
        ("z-image", "Z-Image"),
        ("qwen-image", "Qwen-Image"),
        ("lumina2", "lumina-2"),
        ("wan-14b", "wan2.1"),
        ("hunyuan-video", "hunyuan-video"),
        ("krea-2", "Krea-2"),
    ],
)
def test_architectures_of_published_models(architecture: str, expected: str | None) -> None:
    components = base_models.architecture(architecture).components
    assert architecture_id(components.get("unet") or components["transformer"]) == expected


def test_prediction_type_distinguishes_stable_diffusion_2() -> None:
    unet = base_models.architecture("sd21").components["unet"]
    assert architecture_id(unet, "epsilon") == "stable-diffusion-v2-512"
    assert architecture_id(unet, "v_prediction") == "stable-diffusion-v2-768-v"
    assert architecture_id(SimpleNamespace(config={})) is None
    assert architecture_id(torch.nn.Linear(1, 1)) is None
