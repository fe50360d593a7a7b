"""LoRA with ComfyUI's names: original paths with dots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.formats.cases import deltas, header
from tests.formats.low_rank import assert_same, expected, in_peft, tuned
from tests.raising import raises
from veneer.formats import comfyui, format_of, read
from veneer.injection import LoadError, SaveError, attach
from veneer.testing.pipelines import tiny_pipeline

UNET = ["attn", "xattn", "mlp", "proj", "conv", "time"]
WHERE = {
    "sd": [*UNET, "text/attn", "text/mlp"],
    "sd2": ["attn", "text/attn"],
    "sdxl": [*UNET, "text/attn", "text_2/mlp"],
    "sd3": ["attn", "mlp", "adaln", "embed", "text/attn", "text_2/attn", "text_3/attn"],
    "flux": ["attn", "mlp", "single", "adaln", "text/attn", "text_2/attn"],
    "pixart": ["attn", "xattn", "mlp", "adaln", "embed", "text/attn"],
}


@pytest.mark.parametrize("family", WHERE)
def test_written_and_read_it_is_the_same_change(tmp_path: Path, family: str) -> None:
    attachment = tuned(family, WHERE[family])
    path = comfyui.save(attachment, tmp_path)
    assert all(key.startswith(("diffusion_model.", "text_encoders.")) for key in header(path) if key != "__metadata__")
    assert format_of(read(path)).name == "comfyui"
    assert_same(deltas(veneer.load(tiny_pipeline(family), path)), expected(attachment))


def test_diffusers_reads_it_under_kohyas_spelling(tmp_path: Path) -> None:
    """ComfyUI itself takes `lora_unet_` and underscores for the same path; diffusers reads these for SDXL."""
    attachment = tuned("sdxl", UNET, rank=3)
    state = load_file(comfyui.save(attachment, tmp_path / "x"))
    names = {key: key.partition(".lora_")[0] if ".lora_" in key else key.removesuffix(".alpha") for key in state}
    kohya = {
        f"{name.replace('diffusion_model.', 'lora_unet_').replace('.', '_')}{key.removeprefix(name)}": state[key]
        for key, name in names.items()
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    plain = tiny_pipeline("sdxl")
    plain.load_lora_weights(tmp_path / "kohya.safetensors")
    assert_same(in_peft(plain.components), deltas(attachment))


def test_diffusers_reads_that_of_flux(tmp_path: Path) -> None:
    """Without `linear1`, for which diffusers assumes the real model's widths."""
    where = ["attn@0", "mlp@0", "adaln@0", "single.out", "text/attn"]
    attachment = tuned("flux", where, rank=4)
    plain = tiny_pipeline("flux")
    plain.load_lora_weights(comfyui.save(attachment, tmp_path / "x"))
    assert_same(in_peft(plain.components), deltas(attachment))


@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight")])
def test_pefts_names_of_the_factors(tmp_path: Path, ends: tuple[str, str]) -> None:
    attachment = tuned("flux", ["attn", "single"], rank=3)
    state = load_file(comfyui.save(attachment, tmp_path / "x"))
    words = dict(zip(("lora_down.weight", "lora_up.weight"), ends, strict=True))
    changed = {}
    for key, tensor in state.items():
        name, half = key.rsplit(".lora_", 1) if ".lora_" in key else (key, "")
        changed |= {f"{name}.{words[f'lora_{half}']}": tensor} if half else {}
    save_file(changed, tmp_path / "y.safetensors")
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "y")
    assert_same(deltas(loaded), deltas(attachment))
    assert "no alpha in" in str(loaded.loaded)


def test_text_encoders_by_their_names(tmp_path: Path) -> None:
    found = {}
    for family in ("sd", "sdxl", "sd3", "flux", "pixart"):
        towers = [w for w in ("text/attn.q", "text_2/attn.q", "text_3/attn.q") if w.split("/")[0] in TEXTS[family]]
        keys = load_file(comfyui.save(tuned(family, towers, rank=1), tmp_path / family))
        found[family] = sorted({key.split(".")[1] for key in keys})
    assert found == {
        "sd": ["clip_l"], "sdxl": ["clip_g", "clip_l"], "sd3": ["clip_g", "clip_l", "t5xxl"], "flux": ["clip_l", "t5xxl"],
        "pixart": ["t5xxl"],
    }  # fmt: skip


TEXTS = {
    "sd": ["text"],
    "sdxl": ["text", "text_2"],
    "sd3": ["text", "text_2", "text_3"],
    "flux": ["text", "text_2"],
    "pixart": ["text"],
}


def test_what_it_cannot_hold_is_rejected(tmp_path: Path) -> None:
    with raises(SaveError, given="DiTTransformer2DModel"):
        comfyui.save(attach(tiny_pipeline("dit"), "lora"), tmp_path / "x")
    with raises(SaveError, where="bitfit", given="bitfit", expected="lora"):
        comfyui.save(attach(tiny_pipeline("sd"), "bitfit"), tmp_path / "x")


def test_changes_that_are_no_lora_are_rejected(tmp_path: Path) -> None:
    state = load_file(comfyui.save(tuned("flux", "attn", rank=2), tmp_path / "x"))
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert f"{name}.alpha" in state
    save_file({**state, f"{name}.set_weight": torch.ones(1)}, tmp_path / "y.safetensors")
    with raises(LoadError, where=f"{name}.set_weight", given="a replacement weight"):
        veneer.load(tiny_pipeline("flux"), tmp_path / "y")


def test_of_another_model(tmp_path: Path) -> None:
    path = comfyui.save(tuned("flux", "attn", rank=2), tmp_path / "x")
    with raises(LoadError, unused=tuple(read(path).shapes)):
        veneer.load(tiny_pipeline("sd3"), path)
