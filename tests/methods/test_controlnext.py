"""ControlNeXt: cross normalisation by loops, where it is added, and its size at a real model's shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import veneer
from tests.methods.controls import drawn, picture, pipeline
from veneer.injection.errors import ConditionError
from veneer.methods.additive.controlnext import crossed
from veneer.testing.case import stir


def test_cross_normalisation_number_by_number() -> None:
    torch.manual_seed(0)
    control, x = torch.randn(2, 3, 4, 4, dtype=torch.float64) * 3 + 1, torch.randn(2, 3, 2, 2, dtype=torch.float64) - 2
    found = crossed(control, x)
    for sample in range(2):
        means, stds = [], []
        for values in (control[sample].flatten().tolist(), x[sample].flatten().tolist()):
            mean = sum(values) / len(values)
            means.append(mean)
            stds.append(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
        for got, value in zip(found[sample].flatten().tolist(), control[sample].flatten().tolist(), strict=True):
            assert got == pytest.approx((value - means[0]) / stds[0] * stds[1] + means[1])


@pytest.mark.parametrize("place", ["block", "stem"])
def test_it_is_added_behind_the_first_block_and_to_no_skip(place: str) -> None:
    pipe = pipeline()
    control = veneer.attach(pipe, "controlnext", place=place)
    stir(control)
    ((site, adapter),) = control.parts.values()
    unet, seen = pipe.unet, {}
    path = site.first if place == "block" else "conv_in"

    def kept(name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            seen[name] = output

        return keep

    before = unet.get_submodule(path).register_forward_hook(kept("bare"), prepend=True)
    after = unet.get_submodule(path).register_forward_hook(kept("changed"))
    image = torch.rand(2, 3, 32, 32)
    latent, timestep, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 500]), torch.randn(2, 5, 24)
    with torch.no_grad(), control.given(image=image, strength=0.35, pipeline=unet):
        unet(latent, timestep, context)
    feature = adapter.feature(image, timestep)
    x, changed = (seen[name][0] if isinstance(seen[name], tuple) else seen[name] for name in ("bare", "changed"))
    if place == "block":
        expected = crossed(torch.nn.functional.adaptive_avg_pool2d(feature, x.shape[-2:]), x)
        assert all(torch.equal(a, b) for a, b in zip(seen["bare"][1], seen["changed"][1], strict=True)), "the skips"
    else:
        expected = torch.nn.functional.adaptive_avg_pool2d(crossed(feature, x), x.shape[-2:])
    torch.testing.assert_close(changed, x + 0.35 * expected)
    before.remove()
    after.remove()


def test_published_counts_with_the_output_projections() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    control = veneer.attach(unet, "controlnext", train=("attn.out", "xattn.out"))
    adapters = sum(p.numel() for _, a in control.parts.values() for p in a.parameters())
    assert adapters == 3_526_400
    named = sum(p.numel() for name, p in unet.named_parameters() if "to_out" in name)
    assert sum(p.numel() for p in control.parameters()) - adapters == named == 24_805_760
    assert [group["lr_scale"] for group in control.groups()] == [10.0, 1.0]


def test_it_acts_in_a_pipeline_and_not_beyond_its_part() -> None:
    pipe = pipeline()
    bare = drawn(pipe)
    control = veneer.attach(pipe, "controlnext")
    with control.given(image=picture(1)):
        whole = drawn(pipe)
    with control.given(image=picture(1), end=0.5):
        half = drawn(pipe)
    with control.given(image=picture(1), strength=0):
        none = drawn(pipe)
    assert (none == bare).all()
    assert len({a.tobytes() for a in (bare, whole, half)}) == 3
    with pytest.raises(ConditionError, match="48×48"), control.given(image=picture(1, 48)):
        drawn(pipe)
