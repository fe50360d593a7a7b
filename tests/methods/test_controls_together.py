"""Several controls, a LoRA and a token embedding on one pipeline, against diffusers' own classes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import veneer
from tests.methods.controls import drawn, picture, pipeline, stir
from veneer.formats import diffusers as lora_format
from veneer.formats import embeddings
from veneer.testing.case import perturb as stirred
from veneer.testing.pipelines import tiny_pipeline

PROMPT = "a <toy> house"


def attached(pipe: Any) -> list[veneer.Attachment]:
    """Two ControlNets, a LoRA and a token embedding, all trained."""
    found = [veneer.attach(pipe, "controlnet"), veneer.attach(pipe, "lora", rank=2), veneer.attach(pipe, "controlnet")]
    found.append(veneer.attach(pipe, "textual_inversion", tokens="<toy>", initialize="toy"))
    for n, attachment in enumerate(found):
        stirred(attachment, seed=n, size=0.3)
    return found


def test_two_controls_a_lora_and_a_token_embedding(tmp_path: Path) -> None:
    pipe = pipeline()
    first, lora, second, word = attached(pipe)
    with first.condition(image=picture(1), strength=0.7, end=0.6), second.condition(image=picture(2), strength=0.4, start=0.2):
        ours = drawn(pipe, prompts=PROMPT)
    plain = tiny_pipeline("sd")
    nets = [ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(16, 32, 96)) for _ in range(2)]
    for net, control in zip(nets, (first, second), strict=True):
        ((_, adapter),) = control.parts.values()
        net.load_state_dict(adapter.net.state_dict())
    plain.load_lora_weights(lora_format.save(lora, tmp_path / "lora"))
    plain.load_textual_inversion(embeddings.save(word, tmp_path))
    theirs = StableDiffusionControlNetPipeline(**plain.components, controlnet=nets, requires_safety_checker=False)
    expected = drawn(
        theirs, prompts=PROMPT, image=[picture(1), picture(2)], controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.2], control_guidance_end=[0.6, 1.0],
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_detached_in_any_order_the_base_is_back(order: tuple[int, ...]) -> None:
    pipe = pipeline()
    before = drawn(pipe)
    found = attached(pipe)
    with found[0].condition(image=picture(1)), found[2].condition(image=picture(2)):
        assert not np.array_equal(drawn(pipe), before)
    for place in order:
        found[place].detach()
    assert np.array_equal(drawn(pipe), before)


def test_every_kind_of_control_at_once_in_any_order() -> None:
    pipe = pipeline()
    before = drawn(pipe)
    names = {"controlnet": {}, "t2i_adapter": {}, "controlnext": {}, "ip_adapter": {"width": 8}}

    found = {}
    for n, (name, options) in enumerate(names.items()):
        torch.manual_seed(n)
        found[name] = veneer.attach(pipe, name, **options)
        stirred(found[name], seed=n, size=0.2)
    image, embeds = picture(1), torch.ones(1, 8)
    with (
        found["controlnet"].condition(image=image), found["t2i_adapter"].condition(image=image),
        found["controlnext"].condition(image=image), found["ip_adapter"].condition(embeds=embeds),
    ):  # fmt: skip
        together = drawn(pipe)
        for name in names:
            with found[name].enabled(False):
                assert not np.array_equal(drawn(pipe), together), name
    for attachment in found.values():
        attachment.detach()
    assert np.array_equal(drawn(pipe), before)


def test_weights_of_a_net_are_no_part_of_the_bases() -> None:
    pipe = pipeline()
    keys = list(pipe.unet.state_dict())
    control = veneer.attach(pipe, "controlnet")
    stir(next(iter(control.parts.values()))[1].net)
    assert list(pipe.unet.state_dict()) == keys
