"""DoRA's magnitudes between files and veneer: the paper's W' = m·V / ‖V‖ with V = W + s·B A, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.methods.layers import site_of
from tests.raising import raises
from veneer.formats import convert, lycoris
from veneer.formats._core.dora_magnitudes import base_weight, magnitude, magnitude_delta
from veneer.injection import VeneerError, attach
from veneer.methods.reparameterized.low_rank.dora import DoRA
from veneer.testing.pipelines import tiny_pipeline


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Conv2d(4, 9, 3)], ids=["linear", "conv"])
def test_the_weight_is_that_of_the_paper(layer: Any) -> None:
    """Also for rows that are zero in the base, which have no direction."""
    torch.manual_seed(0)
    layer.weight.data[2:4] = 0
    weight = layer.weight.detach()
    adapter: Any = DoRA(rank=2, alpha=3.0).build(site_of(nn.Sequential(layer)[0]))
    m = torch.rand(9) + 0.5

    def change() -> torch.Tensor:
        return 1.5 * (adapter.up.detach().flatten(1) @ adapter.down.detach().flatten(1)).reshape(weight.shape)

    with torch.no_grad():
        adapter.up.normal_()
        adapter.up[3] = 0  # nothing is changed where there is nothing
        adapter.magnitude_delta.copy_(magnitude_delta(m.view(9, 1), weight, change))
        got = adapter.double().weight(weight.double())
    for row in range(9):
        v = weight[row].double() + 1.5 * (adapter.up[row].flatten() @ adapter.down.flatten(1)).reshape(weight[row].shape)
        want = torch.zeros_like(v) if row == 3 else m[row] * v / v.norm()
        torch.testing.assert_close(got[row], want.detach(), rtol=1e-6, atol=1e-6)
    back = magnitude(adapter.magnitude_delta, weight, change)
    torch.testing.assert_close(back[torch.arange(9) != 3].float(), m[torch.arange(9) != 3])


def test_only_the_bases_own_norms() -> None:
    unet = tiny_pipeline("sd").unet
    lora = attach(unet, "lora", where="attn.q", rank=2)
    with torch.no_grad():
        for p in lora.parameters():
            p.fill_(0.1)
    name, (site, _) = next(iter(lora.parts.items()))
    plain = dict(tiny_pipeline("sd").unet.named_parameters())[f"{name}.weight"]
    assert torch.equal(base_weight(unet, site), plain)  # type: ignore[arg-type]
    lora.merge()
    with raises(VeneerError, where="lora", given="merged"):
        base_weight(unet, site)  # type: ignore[arg-type]


def test_a_change_of_nearly_nothing_is_no_large_difference(tmp_path: Path) -> None:
    """A file holds m itself, in float32: a change of 1e-9 beside it is lost, which is small relative to m."""
    unet = tiny_pipeline("sd").unet
    dora = attach(unet, "dora", where="attn.{q,k}", rank=2)
    with torch.no_grad():
        for number, (_, adapter) in enumerate(dora.parts.values()):
            parts: Any = adapter
            parts.magnitude_delta.fill_(1e-9 if number == 0 else 0.1)
    saved = dora.save(tmp_path / "dora")
    done = convert(tiny_pipeline("sd").unet, saved, "lycoris", tmp_path / "other")
    assert done.weights == len(dora.parts) > 1
    assert done.difference < 1e-5


@pytest.mark.parametrize(("axis", "ratio", "percent"), [("output", 0.1, 0.5), ("output", 0.8, 28.1), ("input", 0.8, 0.0)])
def test_the_weight_in_comfyui(tmp_path: Path, axis: str, ratio: float, percent: float) -> None:
    """ComfyUI's norm is that of W on the output axis, and of W + ΔW on the input axis (`comfy/weight_adapter/base.py`)."""
    pipe = tiny_pipeline("sd")
    tuned = attach(pipe, "dora", where="name:unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", rank=2, norm_axis=axis)
    ((site, parts),) = tuned.parts.values()
    adapter: Any = parts
    weight = base_weight(pipe.unet, site)
    with torch.no_grad():  # ΔW of rank 2 with every row orthogonal to W's, and of the ratio's length
        adapter.down.copy_(torch.linalg.svd(weight)[2][:2])
        rows = torch.stack([torch.stack([-r[1], r[0]]) / r.norm() for r in (weight @ adapter.down.T)])
        adapter.up.copy_(rows * ratio * weight.norm(dim=1, keepdim=True))
        adapter.magnitude_delta.uniform_(0, 0.1)
        want = adapter.weight(weight)
    state = load_file(lycoris.save(tuned, tmp_path / "x"))
    up, down, m = (next(t for k, t in state.items() if k.endswith(end)) for end in ("up.weight", "down.weight", "dora_scale"))
    after = weight + up @ down
    norm = weight.norm(dim=1, keepdim=True) if len(m) == len(weight) else after.norm(dim=0, keepdim=True)
    apart = (after * m / norm).norm(dim=1) / want.norm(dim=1) - 1
    torch.testing.assert_close(100 * apart, torch.full_like(apart, percent), atol=0.05, rtol=0)
