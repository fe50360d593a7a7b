"""ControlNeXt: cross normalization by loops, where it is added, and its size at a real model's shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import veneer
from tests.methods.controls import drawn, picture, pipeline
from tests.raising import raises
from veneer.hosts.diffusers_unet import DiffusersUNet
from veneer.injection.errors import ConditionError
from veneer.methods.additive.control.controlnext import cross_normalize
from veneer.testing.case import perturb


def test_cross_normalization_element_by_element() -> None:
    torch.manual_seed(0)
    control, x = torch.randn(2, 3, 4, 4, dtype=torch.float64) * 3 + 1, torch.randn(2, 3, 2, 2, dtype=torch.float64) - 2
    found = cross_normalize(control, x)
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
    perturb(control)
    ((site, adapter),) = control.parts.values()
    unet = pipe.unet
    seen: dict[str, Any] = {}
    handles = [
        unet.conv_in.register_forward_hook(lambda m, args, y: seen.update(stem=y)),
        unet.get_submodule(site.first).register_forward_pre_hook(lambda m, a, k: seen.update(into=k), with_kwargs=True),
        unet.get_submodule(site.first).register_forward_hook(lambda m, args, y: seen.update(block=y), prepend=True),
        unet.down_blocks[1].register_forward_pre_hook(lambda m, a, k: seen.update(next=k), with_kwargs=True),
        *(
            up.register_forward_pre_hook(lambda m, a, k, i=i: seen.update({f"skips{i}": k}), with_kwargs=True)
            for i, up in enumerate(unet.up_blocks)
        ),
    ]
    image = torch.rand(2, 3, 32, 32)
    latent, timestep, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 500]), torch.randn(2, 5, 24)
    with torch.no_grad(), control.condition(image=image, strength=0.35, pipeline=unet):
        unet(latent, timestep, context)
    feature = adapter.feature(image, timestep)
    skips = [x for i in reversed(range(len(unet.up_blocks))) for x in seen[f"skips{i}"]["res_hidden_states_tuple"]]
    unchanged = [seen["stem"], *seen["block"][1]]
    assert all(torch.equal(a, b) for a, b in zip(skips, unchanged, strict=False)), "the skips"
    x, changed = (seen["block"][0], seen["next"]) if place == "block" else (seen["stem"], seen["into"])
    size = x.shape[-2:]
    if place == "block":
        expected = cross_normalize(torch.nn.functional.adaptive_avg_pool2d(feature, size), x)
    else:
        expected = torch.nn.functional.adaptive_avg_pool2d(cross_normalize(feature, x), size)
    torch.testing.assert_close(changed["hidden_states"], x + 0.35 * expected)
    for handle in handles:
        handle.remove()


def reference(unet: Any, sample: Any, timestep: Any, context: Any, added: Any, control: Any, scale: float, place: str) -> Any:
    """A UNet's forward pass in the authors' order: each skip is stored before the feature is added; `stem` is behind conv_in."""

    def add(x: Any) -> Any:
        pool = torch.nn.functional.adaptive_avg_pool2d
        size = x.shape[-2:]
        return x + scale * (
            cross_normalize(pool(control, size), x) if place == "block" else pool(cross_normalize(control, x), size)
        )

    emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
    more = unet.get_aug_embed(emb, context, added)
    emb = emb if more is None else emb + more
    x = unet.conv_in(sample)
    skips = [x]
    if place == "stem":
        x = add(x)
    for index, block in enumerate(unet.down_blocks):
        options = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        x, new = block(hidden_states=x, temb=emb, **options)
        skips += new
        if index == 0 and place == "block":
            x = add(x)
    x = unet.mid_block(x, emb, encoder_hidden_states=context)
    for block in unet.up_blocks:
        options = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        count = len(block.resnets)
        x, skips = block(hidden_states=x, temb=emb, res_hidden_states_tuple=tuple(skips[-count:]), **options), skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


@pytest.mark.parametrize("place", ["block", "stem"])
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_function_of_the_authors_order(model: str, place: str, checkpointing: bool) -> None:
    """Outputs and gradients of the network and of the base, with and without gradient checkpointing."""
    host = DiffusersUNet()
    torch.manual_seed(0)
    unet: Any = host.tiny()[model]().double().requires_grad_(False)
    inputs = {key: _double(value) for key, value in host.sample(unet).items()}
    control = veneer.attach(unet, "controlnext", place=place, train=("attn.out", "xattn.out"))
    perturb(control)
    unet.double()
    ((_, adapter),) = control.parts.values()
    side = 8 * inputs["sample"].shape[-1]
    image = torch.rand(2, 3, side, side).double()
    trained = list(control.parameters())
    out = torch.randn(inputs["sample"].shape, dtype=torch.float64)
    feature = adapter.feature(image, inputs["timestep"])
    asked = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs"))
    with torch.no_grad(), control.condition(image=image, strength=0, pipeline=unet):
        bare = unet(**inputs).sample
    with torch.enable_grad():
        expected = reference(unet, *asked, feature, 0.7, place)
        wanted = torch.autograd.grad((expected * out).sum(), trained)
        if checkpointing:
            unet.train()
            unet.enable_gradient_checkpointing()
        with control.condition(image=image, strength=0.7, pipeline=unet):
            got = unet(**inputs).sample
            found = torch.autograd.grad((got * out).sum(), trained)
    assert (expected - bare).abs().max() > 0.05 * bare.abs().max(), "the control does something"
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _double(each) for key, each in value.items()}
    return value.double() if value.is_floating_point() else value


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
    with control.condition(image=picture(1)):
        whole = drawn(pipe)
    with control.condition(image=picture(1), end=0.5):
        half = drawn(pipe)
    with control.condition(image=picture(1), strength=0):
        none = drawn(pipe)
    assert (none == bare).all()
    assert len({a.tobytes() for a in (bare, whole, half)}) == 3
    with raises(ConditionError, where="controlnext", given=(48, 48), expected=(32, 32)), control.condition(image=picture(1, 48)):
        drawn(pipe)
