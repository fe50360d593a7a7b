"""T2I-Adapter against diffusers' own class and pipelines, with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline, UNet2DConditionModel
from diffusers import T2IAdapter as Peer

import veneer
from tests.methods.controls import PROMPTS, THREE, drawn, picture, pipeline, stir
from tests.raising import raises
from veneer.injection.errors import ConditionError
from veneer.testing.pipelines import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")  # within diffusers
KINDS = {"full": "full_adapter", "light": "light_adapter"}


def taught(pipe: Any, kind: str, form: str, channels: list[int], factor: int) -> tuple[Peer, veneer.Attachment]:
    """A trained adapter of diffusers, and an attachment with the same weights."""
    torch.manual_seed(0)
    peer = Peer(in_channels=3, channels=channels, num_res_blocks=2, downscale_factor=factor, adapter_type=form)
    stir(peer, size=0.1)
    control = veneer.attach(pipe, "t2i_adapter", kind=kind, blocks=2)
    for _, adapter in control.parts.values():
        adapter.load_state_dict({k.removeprefix("adapter."): v for k, v in peer.state_dict().items()})
    return peer, control


def others(pipe: Any, kind: Any, adapter: Any) -> Any:
    """The pipeline of diffusers for the same parts."""
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return kind(**parts, adapter=adapter, **({} if "XL" in kind.__name__ else {"requires_safety_checker": False}))


@pytest.mark.parametrize("options", [{}, {"kind": "light"}])
def test_a_new_one_is_the_identity_and_is_trained(options: dict[str, Any]) -> None:
    pipe = pipeline()
    before = drawn(pipe)
    control = veneer.attach(pipe, "t2i_adapter", **options)
    with control.condition(image=picture(1)):
        assert np.array_equal(drawn(pipe), before)
    control.probe()
    moved = veneer.attach(pipe, "t2i_adapter", zero_start=False, **options)
    with control.enabled(False), moved.condition(image=picture(1)):
        assert not np.array_equal(drawn(pipe), before), "as torch draws it, it does change the picture"


@pytest.mark.parametrize("kind", ["full", "light"])
@pytest.mark.parametrize("end", [1.0, 0.5])
def test_images_equal_those_of_diffusers(kind: str, end: float) -> None:
    pipe = pipeline()
    channels = [16, 32] if kind == "full" else [16]
    if kind == "light":  # diffusers' light one has a level more than widths, as wide as the last
        pipe = tiny_pipeline("sd", block_out_channels=(16, 16))
    peer, control = taught(pipe, kind, KINDS[kind], channels, 4)
    options = {"prompts": PROMPTS}  # one image each: of several, diffusers gives the second prompt's the first one's features
    images = [picture(1), picture(2)]
    with control.condition(image=images, strength=0.7, end=end):
        ours = drawn(pipe, **options)
    with control.enabled(False):
        bare = drawn(pipe, **options)
    control.detach()
    other = others(pipe, StableDiffusionAdapterPipeline, peer)
    if end < 1:
        other = _for_a_part(other, end)
    theirs = drawn(other, **options, image=images, adapter_conditioning_scale=0.7)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - bare).max() > 0.01


def _for_a_part(pipe: Any, end: float) -> Any:
    """The same with the features of the first part of the schedule only, for which this pipeline of diffusers has no option."""
    seen: list[int] = []

    def cut(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(1)
        if len(seen) > 4 * end:
            kwargs = {**kwargs, "down_intrablock_additional_residuals": None}
        return args, kwargs

    pipe.unet.register_forward_pre_hook(cut, with_kwargs=True)
    return pipe


def test_sdxl() -> None:
    pipe = tiny_pipeline("sdxl", **THREE)
    peer, control = taught(pipe, "full", "full_adapter_xl", [16, 32, 48, 48], 8)
    with control.condition(image=picture(1)):
        ours = drawn(pipe)
    control.detach()
    theirs = others(pipe, StableDiffusionXLAdapterPipeline, peer)
    np.testing.assert_allclose(ours, drawn(theirs, image=picture(1), adapter_conditioning_scale=1.0), atol=1e-4)


SDXL = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": THREE["down_block_types"],
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
}  # fmt: skip
CHANNELS = [320, 640, 1280, 1280]


@pytest.mark.parametrize(
    ("unet", "options", "peer", "published"),
    [
        ({}, {}, ("full_adapter", CHANNELS, 2, 8), 77_369_280),
        (SDXL, {}, ("full_adapter_xl", CHANNELS, 2, 16), 79_028_160),
        ({}, {"kind": "light"}, ("light_adapter", CHANNELS[:3], 4, 8), 18_689_200),
    ],
)
def test_names_shapes_and_counts_of_real_models(
    unet: dict[str, Any], options: dict[str, Any], peer: tuple[str, list[int], int, int], published: int
) -> None:
    form, channels, blocks, factor = peer
    with torch.device("meta"):
        model = UNet2DConditionModel(**{"cross_attention_dim": 768, **unet})
        expected = Peer(in_channels=3, channels=channels, num_res_blocks=blocks, downscale_factor=factor, adapter_type=form)
    control = veneer.attach(model, "t2i_adapter", **options)
    ((site, adapter),) = control.parts.values()
    shapes = {k.removeprefix("adapter."): v.shape for k, v in expected.state_dict().items()}
    assert {k: v.shape for k, v in adapter.state_dict().items()} == shapes
    assert sum(p.numel() for p in control.parameters()) == control.method.count(site) == published


def test_features_are_computed_once_per_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    control = veneer.attach(pipe, "t2i_adapter")
    ((_, adapter),) = control.parts.values()
    made: list[int] = []
    own = type(adapter).features
    monkeypatch.setattr(type(adapter), "features", lambda self, image: made.append(1) or own(self, image))
    with control.condition(image=picture(1)):
        drawn(pipe)
        assert len(made) == 1
        with torch.no_grad():
            next(adapter.parameters()).add_(1)
        drawn(pipe)
        assert len(made) == 2, "after a step of training they are made anew"


def test_another_size_is_rejected() -> None:
    pipe = pipeline()
    control = veneer.attach(pipe, "t2i_adapter")
    with raises(ConditionError, where="t2i_adapter", given=(48, 48), expected=(32, 32)), control.condition(image=picture(1, 48)):
        drawn(pipe)
