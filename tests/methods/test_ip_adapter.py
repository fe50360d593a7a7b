"""IP-Adapter against diffusers' own processors, with the same weights in the original layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import veneer
from tests.methods.controls import PROMPTS, drawn, picture, pipeline
from tests.raising import raises
from veneer.injection.errors import ConditionError
from veneer.testing.case import perturb

WIDTH = 40


def layout(control: veneer.Attachment) -> dict[str, dict[str, torch.Tensor]]:
    """Trained tensors in the authors' layout: projections of the n-th cross-attention under 2n + 1."""
    parts = sorted(control.parts.values(), key=lambda part: part[0].index)
    shared = parts[0][1].shared
    layers = {
        f"{2 * n + 1}.{name}.weight": getattr(adapter, name).weight.detach().clone()
        for n, (_, adapter) in enumerate(parts)
        for name in ("to_k_ip", "to_v_ip")
    }
    return {"image_proj": {k: v.clone() for k, v in shared.state_dict().items()}, "ip_adapter": layers}


def taught(pipe: Any, **options: Any) -> veneer.Attachment:
    torch.manual_seed(1)
    control = veneer.attach(pipe, "ip_adapter", width=WIDTH, **options)
    perturb(control, size=0.3)
    return control


def peer(pipe: Any, states: list[dict[str, Any]], scale: Any = 1.0) -> Any:
    """The same pipeline with diffusers' own adapter."""
    pipe.load_ip_adapter(states, subfolder="", weight_name=[""] * len(states), image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    return pipe


def embeds(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves(*several: torch.Tensor) -> list[torch.Tensor]:
    """Zeros for the half without a prompt in front, as diffusers requires."""
    return [torch.cat([torch.zeros_like(e), e]) for e in several]


SHAPES = {"base": (WIDTH,), "plus": (5, WIDTH)}
NAMES = ("sd", "sdxl")


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("family", NAMES)
def test_images_equal_those_of_diffusers(kind: str, family: str) -> None:
    pipe = pipeline(family)
    control = taught(pipe, kind=kind)
    given = embeds((1, 2, *SHAPES[kind]))
    with control.condition(embeds=given, strength=0.6):
        ours = drawn(pipe)
    with control.enabled(False):
        bare = drawn(pipe)
    state = layout(control)
    control.detach()
    theirs = drawn(peer(pipe, [state], 0.6), ip_adapter_image_embeds=halves(given))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - bare).max() > 0.01


def test_two_adapters_and_masks() -> None:
    pipe = pipeline()
    first, second = taught(pipe), taught(pipe, kind="plus")
    a, b = embeds((1, 2, WIDTH)), embeds((1, 1, 5, WIDTH), 1)
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :16] = 255
    masks = [Image.fromarray(left), Image.fromarray(255 - left)]
    with first.condition(embeds=a, mask=masks, strength=0.8), second.condition(embeds=b, strength=0.5):
        ours = drawn(pipe)
    states = [layout(first), layout(second)]
    second.detach()
    first.detach()
    tensors = torch.stack([torch.from_numpy(np.asarray(m, dtype=np.float32) / 255) for m in masks])[None]
    theirs = drawn(
        peer(pipe, states, [[0.8, 0.8], 0.5]), ip_adapter_image_embeds=halves(a, b),
        cross_attention_kwargs={"ip_adapter_masks": [tensors, torch.ones(1, 1, 32, 32)]},
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_one_image_for_each_prompt() -> None:
    pipe = pipeline()
    control = taught(pipe)
    several = embeds((2, WIDTH))
    with control.condition(embeds=several):
        together = drawn(pipe, prompts=PROMPTS, num_images_per_prompt=2)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for n, prompt in enumerate(PROMPTS):
        with control.condition(embeds=several[n : n + 1]):
            alone = drawn(pipe, prompts=prompt, num_images_per_prompt=2, latents=latents[2 * n : 2 * n + 2])
        np.testing.assert_allclose(together[2 * n : 2 * n + 2], alone, atol=1e-5)


def encoder() -> dict[str, Any]:
    """A tiny CLIP image encoder."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=WIDTH,
    )  # fmt: skip
    return {
        "image_encoder": CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    }


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_images_are_embedded_by_the_pipelines_own_encoder(kind: str) -> None:
    pipe = pipeline()
    pipe.register_modules(**encoder())
    torch.manual_seed(1)
    control = veneer.attach(pipe, "ip_adapter", kind=kind, width=WIDTH if kind == "base" else 16)
    perturb(control, size=0.3)
    with control.condition(image=picture(1)):
        ours = drawn(pipe)
    state = layout(control)
    control.detach()
    np.testing.assert_allclose(ours, drawn(peer(pipe, [state]), ip_adapter_image=picture(1)), atol=1e-4)


def test_strengths_of_blocks() -> None:
    pipe = pipeline()
    control = taught(pipe)
    given = embeds((1, WIDTH))
    stages = {site.stage for site, _ in control.parts.values()}
    assert stages == {"down.0", "mid", "up.1"}
    with control.condition(embeds=given, layers={"*": 0.0, "up.1": 0.7}):
        ours = drawn(pipe)
    state = layout(control)
    control.detach()
    scale = {"down": 0.0, "mid": 0.0, "up": {"block_1": 0.7}}
    np.testing.assert_allclose(ours, drawn(peer(pipe, [state], scale), ip_adapter_image_embeds=halves(given[None])), atol=1e-4)


@pytest.mark.parametrize("zero_start", [True, False])
def test_a_new_one_starts_as_the_hosts_own(zero_start: bool) -> None:
    pipe = pipeline()
    before = drawn(pipe)
    control = veneer.attach(pipe, "ip_adapter", width=WIDTH, zero_start=zero_start)
    for site, adapter in control.parts.values():
        host = pipe.unet.get_submodule(site.path)
        assert torch.equal(adapter.to_k_ip.weight, host.to_k.weight)
        assert torch.equal(adapter.to_v_ip.weight, torch.zeros_like(host.to_v.weight) if zero_start else host.to_v.weight)
    with control.condition(embeds=embeds((1, WIDTH))):
        assert np.array_equal(drawn(pipe), before) is zero_start


@pytest.mark.parametrize(("options", "published"), [({}, 22_319_616), ({"kind": "plus", "width": 1280}, 49_087_488)])
def test_published_counts(options: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    control = veneer.attach(unet, "ip_adapter", **options)
    assert sum(p.numel() for p in control.parameters()) == published
    assert sum(control.method.count(site) for site, _ in control.parts.values()) == 19_169_280


@pytest.mark.parametrize(
    ("given", "data"),
    [
        ({}, {"given": (), "expected": ("image", "embeds")}),
        ({"image": picture(1)}, {"where": "pipeline", "expected": ("image_encoder", "feature_extractor")}),
        ({"embeds": embeds((1, WIDTH + 1))}, {"where": "embeds", "given": WIDTH + 1, "expected": WIDTH}),
        ({"embeds": embeds((1, 2, 3, WIDTH))}, {"where": "embeds", "given": (1, 2, 3, WIDTH)}),
        (
            {"embeds": embeds((1, WIDTH)), "layers": {"up.9": 1.0}},
            {"where": "layers", "given": "up.9", "expected": ("down.0", "mid", "up.1")},
        ),
        ({"embeds": embeds((1, 2, WIDTH)), "mask": picture(1)}, {"where": "mask", "given": 1, "expected": 2}),
        ({"embeds": embeds((3, WIDTH))}, {"where": "ip_adapter", "given": 3, "expected": 1}),
    ],
)
def test_what_cannot_be_used_is_rejected(given: dict[str, Any], data: dict[str, Any]) -> None:
    pipe = pipeline()
    control = veneer.attach(pipe, "ip_adapter", width=WIDTH)
    with raises(ConditionError, **data), control.condition(**given):
        drawn(pipe)
