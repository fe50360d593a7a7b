"""Fused projections of FLUX in kohya's layout: one pair of factors for all slices, or one per slice."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.formats.cases import deltas
from tests.formats.low_rank import assert_same, tuned
from veneer.formats import kohya
from veneer.testing.pipelines import tiny_pipeline

SLICES = "transformer.single_transformer_blocks.0.attn.to_"


def test_fused_weights_are_the_slices_one_below_the_other(tmp_path: Path) -> None:
    """ΔW of `linear1` is q, k, v and the feed-forward's input in this order, zero where a slice is not adapted."""
    attachment = tuned("flux", [f"name:{SLICES}q", f"name:{SLICES}v"], rank=3, by_site={"attn.v": {"rank": 5, "alpha": 4.0}})
    state = load_file(kohya.save(attachment, tmp_path / "x"))
    name = "lora_unet_single_blocks_0_linear1"
    down, up, alpha = (state[f"{name}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    want = deltas(attachment)
    zero = torch.zeros_like(want[f"{SLICES}q"])
    mlp = torch.zeros(len(up) - 3 * len(zero), zero.shape[1])
    assert state.keys() == {f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    fused = torch.cat([want[f"{SLICES}q"], zero, want[f"{SLICES}v"], mlp])
    torch.testing.assert_close(alpha / len(down) * up @ down, fused, rtol=1e-5, atol=1e-6)
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "x")
    assert_same(deltas(loaded), want)
    assert {name: a.down.shape[0] for name, (_, a) in loaded.parts.items()} == {f"{SLICES}q": 3, f"{SLICES}v": 5}


def test_a_fused_pair_for_all_slices_stays_one(tmp_path: Path) -> None:
    """As sd-scripts train it: one `down` for q, k and v."""
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.randn(96, 4)}
    save_file({**state, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "x")
    block = "transformer.transformer_blocks.0.attn.add_{}_proj"
    whole = 0.5 * state[f"{name}.lora_up.weight"].double() @ state[f"{name}.lora_down.weight"].double()
    assert_same(deltas(loaded), {block.format(x): rows for x, rows in zip("qkv", whole.chunk(3), strict=True)})
    again = load_file(kohya.save(loaded, tmp_path / "again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_a_component_that_touches_one_late_row_is_kept(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    down, up = torch.randn(4, 32), torch.randn(96, 4)
    up[:32, 1], up[32:64, 2:] = 0, 0
    up[31, 1] = 3.0
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "x.safetensors")
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "x")
    block = "transformer.transformer_blocks.0.attn.add_{}_proj"
    whole = up.double() @ down.double()
    assert_same(deltas(loaded), {block.format(x): rows for x, rows in zip("qkv", whole.chunk(3), strict=True)})
    assert [a.down.shape[0] for _, a in loaded.parts.values()] == [4, 2, 4]


def test_a_fused_pair_of_zeros_is_loaded(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.zeros(96, 4)}
    save_file(state, tmp_path / "x.safetensors")
    assert len(veneer.load(tiny_pipeline("flux"), tmp_path / "x").parts) == 3
