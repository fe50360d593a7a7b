"""ControlNet against diffusers' own class and pipelines, with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image

import veneer
from tests.methods.controls import PROMPTS, drawn, picture, pipeline, stir
from tests.raising import raises
from veneer.injection.errors import ConditionError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' schedulers


def taught(pipe: Any, seed: int = 3) -> tuple[ControlNetModel, veneer.Attachment]:
    """A trained network of diffusers for the pipeline, and an attachment with the same weights."""
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    stir(net, seed)
    control = veneer.attach(pipe, "controlnet")
    for _, adapter in control.parts.values():
        adapter.net.load_state_dict(net.state_dict())
    return net, control


def others(pipe: Any, kind: Any, **more: Any) -> Any:
    """Another pipeline of the same parts."""
    return kind(**{**pipe.components, **more}, requires_safety_checker=False)


@pytest.fixture
def pipe() -> Any:
    return pipeline()


def test_a_new_one_is_the_identity(pipe: Any) -> None:
    before = drawn(pipe)
    control = veneer.attach(pipe, "controlnet")
    with control.condition(image=picture(1)):
        assert np.array_equal(drawn(pipe), before)
    control.detach()
    assert np.array_equal(drawn(pipe), before)


SCHEDULERS = [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS], ids=lambda s: s.__name__ if s else "DDIM")
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.3, 0.8)], ids=["whole", "part"])
def test_images_equal_those_of_diffusers(pipe: Any, scheduler: Any, part: tuple[float, float]) -> None:
    net, control = taught(pipe)
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    start, end = part
    with control.condition(image=picture(1), strength=0.7, start=start, end=end):
        ours = drawn(pipe)
    bare = drawn_off(pipe, control)
    control.detach()
    theirs = drawn(
        others(pipe, StableDiffusionControlNetPipeline, controlnet=net), image=picture(1), controlnet_conditioning_scale=0.7,
        control_guidance_start=start, control_guidance_end=end,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - bare).max() > 0.01, "the net does something"


def drawn_off(pipe: Any, control: veneer.Attachment) -> np.ndarray:
    with control.enabled(False):
        return drawn(pipe)


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("guess", [False, True])
def test_batches_of_different_images(pipe: Any, guidance: float, guess: bool) -> None:
    net, control = taught(pipe)
    images = [picture(1), picture(2)]
    options = {"prompts": PROMPTS, "guidance_scale": guidance, "num_images_per_prompt": 2}
    with control.condition(image=images, guess=guess):
        ours = drawn(pipe, **options)
    control.detach()
    other = others(pipe, StableDiffusionControlNetPipeline, controlnet=net)
    theirs = drawn(other, **options, image=images, guess_mode=guess)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_image_to_image(pipe: Any) -> None:
    net, control = taught(pipe)
    redraw = others(pipe, StableDiffusionImg2ImgPipeline)
    options = {"image": picture(5), "strength": 0.6, "steps": 8, "side": 0}
    with control.condition(image=picture(1), start=0.2, pipeline=redraw):
        ours = drawn(redraw, **options)
    control.detach()
    theirs = drawn(
        others(pipe, StableDiffusionControlNetImg2ImgPipeline, controlnet=net), control_image=picture(1),
        control_guidance_start=0.2, controlnet_conditioning_scale=1.0, **options,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_inpainting(pipe: Any) -> None:
    net, control = taught(pipe)
    mend = others(pipe, StableDiffusionInpaintPipeline)
    mask = Image.fromarray(np.tri(32, dtype=np.uint8) * 255)
    options = {"image": picture(5), "mask_image": mask, "height": 32, "width": 32, "strength": 0.9}
    with control.condition(image=picture(1), pipeline=mend):
        ours = drawn(mend, **options)
    control.detach()
    theirs = drawn(
        others(pipe, StableDiffusionControlNetInpaintPipeline, controlnet=net), control_image=picture(1),
        controlnet_conditioning_scale=1.0, **options,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_sdxl() -> None:
    pipe = pipeline("sdxl")
    net, control = taught(pipe)
    with control.condition(image=picture(1)):
        ours = drawn(pipe)
    control.detach()
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    theirs = StableDiffusionXLControlNetPipeline(**parts, controlnet=net, add_watermarker=False)
    np.testing.assert_allclose(ours, drawn(theirs, image=picture(1), controlnet_conditioning_scale=1.0), atol=1e-4)


@pytest.mark.parametrize(("options", "published"), [({"cross_attention_dim": 768}, 361_279_120), (
    {
        "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    1_251_014_160,
)], ids=["sd15", "sdxl"])  # fmt: skip
def test_names_shapes_and_counts_of_real_models(options: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**options)
        expected = ControlNetModel.from_unet(unet, load_weights_from_unet=False).state_dict()
    control = veneer.attach(unet, "controlnet")
    ((site, adapter),) = control.parts.values()
    assert {k: v.shape for k, v in adapter.net.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert sum(p.numel() for p in control.parameters()) == control.method.count(site) == published


@pytest.mark.parametrize(
    ("given", "data"),
    [
        ({}, {"given": None, "expected": ("image",)}),
        ({"image": picture(1, 48)}, {"given": (48, 48), "expected": (32, 32)}),
        ({"image": torch.rand(1, 1, 32, 32)}, {"given": 1, "expected": 3}),
        ({"image": torch.rand(1, 3, 32, 32) * 255}, {"expected": (0, 1)}),
        ({"image": [picture(1), picture(1, 48)]}, {"given": ("32×32", "48×48")}),
        ({"image": [picture(1), picture(2), picture(3)]}, {"given": 3, "expected": 1}),
        ({"image": picture(1), "start": 0.9, "end": 0.1}, {"given": (0.9, 0.1)}),
        ({"image": picture(1), "img": 1}, {"given": ("image", "img"), "expected": ("image", "guess")}),
        ({"image": "edges.png"}, {"given": "str"}),
    ],
)
def test_what_cannot_be_used_is_rejected(pipe: Any, given: dict[str, Any], data: dict[str, Any]) -> None:
    control = veneer.attach(pipe, "controlnet")
    with raises(ConditionError, where="controlnet", **data), control.condition(**given):
        drawn(pipe)


def test_outside_of_a_scope_and_by_another_pipeline(pipe: Any) -> None:
    control = veneer.attach(pipe, "controlnet")
    with raises(ConditionError, where="controlnet", given=(), expected=("image", "guess")):
        drawn(pipe)
    drawn_off(pipe, control)
    other = others(pipe, StableDiffusionImg2ImgPipeline)
    with control.condition(image=picture(1)), raises(ConditionError, where="controlnet", expected=type(pipe).__name__):
        drawn(other, image=picture(5), side=0)
    with raises(ConditionError, where="lora", given=("image",), expected=()):
        veneer.attach(pipe, "lora").condition(image=picture(1))
