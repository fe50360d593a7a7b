"""Generated images of ControlNet, T2I-Adapter and IP-Adapter beside diffusers' own classes and pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline

from tests.methods import test_controlnet, test_ip_adapter, test_t2i_adapter
from tests.methods.controls import PROMPTS, drawn, picture, pipeline
from tests.parity.measure import Row, largest_difference
from tests.parity.oracle import Package

ORACLE = Package("diffusers", "diffusers")
METHODS = ("controlnet", "ip_adapter", "t2i_adapter")
COMPARED = "images of a tiny Stable Diffusion"


def rows() -> list[Row]:
    """Trained weights of each, at a strength below 1."""
    differences = (_controlnet(), _ip_adapter(), _t2i_adapter())
    return [Row(name, COMPARED, largest_difference([pair]), "float32") for name, pair in zip(METHODS, differences, strict=True)]


def _pair(ours: Any, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(ours), torch.as_tensor(theirs)


def _controlnet() -> Any:
    pipe = pipeline()
    net, control = test_controlnet.taught(pipe)
    with control.condition(image=picture(1), strength=0.7):
        ours = drawn(pipe)
    control.detach()
    other = test_controlnet.others(pipe, StableDiffusionControlNetPipeline, controlnet=net)
    return _pair(ours, drawn(other, image=picture(1), controlnet_conditioning_scale=0.7))


def _t2i_adapter() -> Any:
    pipe = pipeline()
    peer, control = test_t2i_adapter.taught(pipe, "full", "full_adapter", [16, 32], 4)
    images = [picture(1), picture(2)]
    with control.condition(image=images, strength=0.7):
        ours = drawn(pipe, prompts=PROMPTS)
    control.detach()
    other = test_t2i_adapter.others(pipe, StableDiffusionAdapterPipeline, peer)
    return _pair(ours, drawn(other, prompts=PROMPTS, image=images, adapter_conditioning_scale=0.7))


def _ip_adapter() -> Any:
    pipe = pipeline()
    control = test_ip_adapter.taught(pipe, kind="base")
    embeds = test_ip_adapter.embeds((1, 2, *test_ip_adapter.SHAPES["base"]))
    with control.condition(embeds=embeds, strength=0.6):
        ours = drawn(pipe)
    state = test_ip_adapter.layout(control)
    control.detach()
    other = test_ip_adapter.peer(pipe, [state], 0.6)
    return _pair(ours, drawn(other, ip_adapter_image_embeds=test_ip_adapter.halves(embeds)))
