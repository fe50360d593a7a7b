"""ControlNeXt in UNets of Stable Diffusion 1.5 and SDXL beside its authors' network and UNets."""

from __future__ import annotations

import typing
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D

from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link, links
from tests.parity.oracle import Repository
from veneer.hosts.diffusers_unet import DiffusersUNet
from veneer.injection import attach

ORACLE = Repository("dvlab-research/ControlNeXt", "ab4b3acf912cc178d23bbf003369dfb657fc8d01")
METHODS = ("controlnext",)
FOLDERS = {"sd1": "ControlNeXt-SD1.5-Training", "sdxl": "ControlNeXt-SDXL"}
NETWORKS = {"sd1": ("controlnext.py", "ControlNeXtModel"), "sdxl": ("controlnet.py", "ControlNetModel")}
ARGUMENTS = {"sd1": "conditional_controls", "sdxl": "controls"}
STRENGTH, WIDTH = 0.75, 16


def rows() -> list[Row]:
    """The network, its place in the UNet, and the output projections of the attentions, which are trained too."""
    text = "the code for generation with SD 1.5 adds the feature behind the middle block; compared is that for training"
    return [
        Row("controlnext", "place='block', UNet of SD 1.5: outputs, gradients", _difference("sd1", "block"), deviations=text),
        Row("controlnext", "place='stem', UNet of SDXL: outputs, gradients", _difference("sdxl", "stem")),
    ]


def _network(model: str) -> Any:
    """The authors' network with the width of the tiny UNet."""
    path, name = NETWORKS[model]
    mixins = {"ModelMixin": ModelMixin, "ConfigMixin": ConfigMixin, "register_to_config": register_to_config}
    layers = {layer.__name__: layer for layer in (Downsample2D, ResnetBlock2D, TimestepEmbedding, Timesteps)}
    types = {kind: getattr(typing, kind) for kind in ("Any", "Dict", "List", "Optional", "Tuple", "Union")}
    last = "out_channels=320" if model == "sd1" else "final_out_channels: int = 320"
    width = {last: last.replace("320", str(WIDTH))}
    code = ORACLE.definitions(
        f"{FOLDERS[model]}/models/{path}", name, replace=width, ControlNetOutput=None, **mixins, **layers, **types
    )
    network = getattr(code, name)().double().eval()
    network.scale = STRENGTH
    perturb(network, 0.1)
    return network


def _difference(model: str, place: str) -> float:
    torch.manual_seed(0)
    unet: Any = DiffusersUNet().tiny()[model]().double().requires_grad_(False)
    perturb(unet, 0.02)
    code = ORACLE.module(f"{FOLDERS[model]}/models/unet.py", f"controlnext_{model}_unet")
    theirs = code.UNet2DConditionModel.from_config(dict(unet.config)).double().eval().requires_grad_(False)
    theirs.load_state_dict(unet.state_dict())
    network = _network(model)
    control: Any = attach(unet, "controlnext", place=place, train=("attn.out", "xattn.out"))
    ((_, ours),) = control.parts.values()
    ours.double()
    trained = {name: name for name, p in unet.named_parameters() if "to_out" in name and p.requires_grad}
    assert trained
    for name in trained:
        theirs.get_parameter(name).requires_grad_(True).data.add_(0.05 * randn(*theirs.get_parameter(name).shape))
    pairs = links(unet, theirs, **trained) + [(p, link(network.get_parameter(name))) for name, p in ours.named_parameters()]
    inputs = _double(DiffusersUNet().sample(unet))
    side = 8 * inputs["sample"].shape[-1]
    image = randn(2, 3, side, side).sigmoid().float().double()  # conditions are float32

    def run() -> torch.Tensor:
        with control.condition(image=image, strength=STRENGTH, pipeline=unet):
            output: torch.Tensor = unet(**inputs).sample
            return output

    def official() -> torch.Tensor:
        output: torch.Tensor = theirs(**inputs, **{ARGUMENTS[model]: network(image, inputs["timestep"])}).sample
        return output

    return measure(run, official, pairs)


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _double(each) for key, each in value.items()}
    return value.double() if value.is_floating_point() else value
