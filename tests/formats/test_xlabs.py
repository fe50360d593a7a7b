"""LoRA of FLUX.1 as x-flux writes it: diffusers reads it without veneer."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import veneer
from tests.formats.cases import deltas
from tests.formats.low_rank import assert_same, expected, in_peft, tuned
from tests.raising import raises
from veneer.formats import format_of, read, xlabs
from veneer.injection import SaveError
from veneer.testing.pipelines import tiny_pipeline

WHERE = ["attn", "single.out"]


def test_diffusers_reads_what_is_written(tmp_path: Path) -> None:
    attachment = tuned("flux", WHERE)
    path = xlabs.save(attachment, tmp_path / "x")
    keys = load_file(path)
    assert {k.partition(".processor.")[2] for k in keys if k.startswith("double")} == {
        f"{what}_lora{stream}.{half}.weight" for what in ("qkv", "proj") for stream in (1, 2) for half in ("down", "up")
    }
    assert {k.partition(".processor.")[2] for k in keys if k.startswith("single_blocks.1.")} == {
        f"{what}_lora.{half}.weight" for what in ("qkv", "proj") for half in ("down", "up")
    }
    plain = tiny_pipeline("flux")
    plain.load_lora_weights(path)
    assert_same(in_peft(plain.components), expected(attachment))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_read_as_diffusers_reads_it(tmp_path: Path, prefix: str) -> None:
    """One pair for the three projections, as it is trained."""
    state = load_file(xlabs.save(tuned("flux", WHERE), tmp_path / "x"))
    shapes = {k: t.shape for k, t in state.items()}
    save_file({f"{prefix}{k}": t.normal_(std=0.2) for k, t in state.items()}, tmp_path / "y.safetensors")
    assert format_of(read(tmp_path / "y")).name == "xlabs"
    assert shapes["single_blocks.0.processor.qkv_lora.up.weight"][0] == 3 * 32
    plain = tiny_pipeline("flux")
    plain.load_lora_weights(tmp_path / "y.safetensors")
    assert_same(deltas(veneer.load(tiny_pipeline("flux"), tmp_path / "y")), in_peft(plain.components))


@pytest.mark.parametrize(
    ("family", "where", "given"),
    [
        ("flux", "single.in", "FluxTransformer2DModel"),
        ("flux", "mlp", "FluxTransformer2DModel"),
        ("flux", "text/attn", "CLIPTextModel"),
        ("sd", "attn", "UNet2DConditionModel"),
    ],
)
def test_what_has_no_name_is_rejected(tmp_path: Path, family: str, where: str, given: str) -> None:
    with raises(SaveError, given=given):
        xlabs.save(tuned(family, where, rank=1), tmp_path / "x")
