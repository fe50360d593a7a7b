"""ControlNeXt beside its authors' networks and normalizations for Stable Diffusion 1.5 and SDXL."""

from __future__ import annotations

import textwrap
import typing
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from torch import Tensor, nn

from tests.methods.controls import pipeline
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("dvlab-research/ControlNeXt", "ab4b3acf912cc178d23bbf003369dfb657fc8d01")
METHODS = ("controlnext",)
MODULES = {
    "ConfigMixin": ConfigMixin, "register_to_config": register_to_config, "ModelMixin": ModelMixin, "Timesteps": Timesteps,
    "TimestepEmbedding": TimestepEmbedding, "ResnetBlock2D": ResnetBlock2D, "Downsample2D": Downsample2D,
    "ControlNetOutput": dict,
}  # fmt: skip
TYPES = {name: getattr(typing, name) for name in ("Dict", "List", "Optional", "Tuple", "Union")}


@dataclass(frozen=True)
class Form:
    """Folder and names of the authors' code for one model, and the place in ours."""

    model: str
    folder: str
    file: str
    name: str
    controls: str
    place: str


FORMS = (
    Form("SD 1.5", "ControlNeXt-SD1.5-Training/models", "controlnext.py", "ControlNeXtModel", "conditional_controls", "block"),
    Form("SDXL", "ControlNeXt-SDXL/models", "controlnet.py", "ControlNetModel", "controls", "stem"),
)


def rows() -> list[Row]:
    """Networks with parameters that are not the initial ones, at a strength below 1."""
    compared = "network, cross normalization and sum, {}: outputs, gradients"
    return [Row("controlnext", compared.format(form.model), _difference(form)) for form in FORMS]


def _difference(form: Form) -> float:
    unet = pipeline().unet
    tuned = attach(unet, "controlnext", place=form.place)
    ours: Any = next(iter(tuned.parts.values()))[1].double()
    width, strength = ours.mid_convs[1].out_channels, 0.7
    code = ORACLE.definitions(f"{form.folder}/{form.file}", form.name, replace={"320": str(width)}, **MODULES, **TYPES)
    theirs = getattr(code, form.name)().double()
    perturb(theirs, 0.1)
    theirs.scale = strength
    add = _lines(f"{form.folder}/unet.py", f"scale = {form.controls}['scale']", f"sample = sample + {form.controls} * scale\n")
    image, timestep = randn(2, 3, 64, 64), torch.tensor([7, 500])
    x, y = (randn(2, width, 4, 4, seed=2).requires_grad_() for _ in range(2))

    def run_ours() -> Tensor:
        ours.call.prepared = ours.feature(image, timestep)
        out: Tensor = x + strength * ours.change(x)
        return out

    def run_theirs() -> Tensor:
        state = {"nn": nn, "torch": torch, "sample": y, form.controls: theirs(image, timestep)}
        exec(add, state)
        return state["sample"]

    parameters = dict(theirs.named_parameters())
    pairs: Any = [(p, link(parameters.pop(name))) for name, p in ours.named_parameters() if name in parameters]
    assert not parameters
    assert len(pairs) == len(list(ours.parameters()))
    return measure(run_ours, run_theirs, [*pairs, (x, link(y))])


def _lines(path: str, start: str, end: str) -> Any:
    """Code of consecutive lines."""
    text = ORACLE.read(path)
    first = text.rindex("\n", 0, text.index(start)) + 1
    last = text.index(end, first) + len(end)
    return compile(textwrap.dedent(text[first:last]), path, "exec")
