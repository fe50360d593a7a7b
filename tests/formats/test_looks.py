"""`inspect` tells the layers, ranks and alphas of every format, and whether a file fits a base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.formats.low_rank import tuned
from veneer.formats import formats, inspect
from veneer.testing.pipelines import tiny_pipeline

# what a file holds of FLUX's attention: 8 projections in the double block, of which 2 × 3 are fused, and 3 in each single one
LAYERS = {
    "kohya": 4 + 2,
    "comfyui": 4 + 2,
    "xlabs": 4 + 2,
    "onetrainer": 8 + 6,
    "diffusers": 8 + 6,
    "peft_folder": 8 + 6,
    "native": 14,
}


@pytest.mark.parametrize("form", LAYERS)
def test_layers_ranks_and_alphas(tmp_path: Path, form: str) -> None:
    attachment = tuned("flux", "attn", rank=2, alpha=3.0)
    path = formats.get(form)().save(attachment, tmp_path / form)
    pipe = tiny_pipeline("flux")
    found = inspect(path, pipe)
    assert (found.format, found.family, found.fits) == (form, "FLUX" if form == "xlabs" else None, True)
    assert sum(block.layers for block in found.blocks) == LAYERS[form]
    assert {block.method for block in found.blocks} == {"lora"}
    assert sum(block.values for block in found.blocks) == sum(t.numel() for t in load_file(path).values())
    scales = {alpha / rank for block in found.blocks for alpha, rank in zip(block.alphas, block.ranks, strict=True)}
    assert scales == {1.0 if form == "xlabs" else 1.5}  # which has no alpha: the scale is in B
    assert veneer.attachments(pipe) == []


@pytest.mark.parametrize("form", ["comfyui", "onetrainer", "xlabs"])
def test_unused_tensors_are_reported(tmp_path: Path, form: str) -> None:
    state = load_file(formats.get(form)().save(tuned("flux", "attn", rank=2), tmp_path / "x"))
    key = next(k for k in state if "down" in k)
    away = key.replace("double_blocks.0", "double_blocks.7").replace("transformer_blocks_0", "transformer_blocks_7")
    assert away != key
    save_file({**state, away: torch.ones(2, 2)}, tmp_path / "y.safetensors")
    found = inspect(tmp_path / "y", tiny_pipeline("flux"))
    assert (found.fits, found.unused) == (False, (away,))


def test_bundled_tokens_are_reported(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    words = veneer.attach(pipe, "textual_inversion", tokens=("<one>", "<two>"))
    for form in ("native", "embeddings", "onetrainer"):
        path = formats.get(form)().save(words, tmp_path / form)
        assert sorted(inspect(path).words) == ["<one>", "<two>"], form
    words.detach()
    path = formats.get("kohya")().save(tuned("flux", "attn", rank=2), tmp_path / "kohya")
    assert inspect(path).words == ()
    save_file(load_file(path), tmp_path / "named.safetensors", {"modelspec.trigger_phrase": " a toy "})
    assert inspect(tmp_path / "named").words == ("a toy",)
    assert "trigger tokens: a toy" in str(inspect(tmp_path / "named"))
