"""A control and a LoRA, written for diffusers and loaded there without veneer: the same images, each alone and together."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)

import veneer
from tests.methods.controls import THREE, drawn, picture, pipeline
from veneer.formats import formats
from veneer.testing.case import perturb

WIDTH = 40
STRENGTH = 0.8
PIPELINES = {
    ("controlnet", "sd"): StableDiffusionControlNetPipeline,
    ("controlnet", "sdxl"): StableDiffusionXLControlNetPipeline,
    ("t2i_adapter", "sd"): StableDiffusionAdapterPipeline,
    ("t2i_adapter", "sdxl"): StableDiffusionXLAdapterPipeline,
}
OPTIONS: dict[str, dict[str, Any]] = {"controlnet": {}, "t2i_adapter": {}, "ip_adapter": {"width": WIDTH}}


def base(family: str) -> Any:
    """SDXL with as many blocks as its T2I-Adapters require."""
    return pipeline(family, **(THREE if family == "sdxl" else {}))


def embeds() -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))


def given(method: str) -> dict[str, Any]:
    return {"embeds": embeds()} if method == "ip_adapter" else {"image": picture(1)}


def written(attachment: veneer.Attachment, folder: Path) -> Path:
    """Save in the format that diffusers reads: a folder, or a named file."""
    form: Any = formats.get(attachment.method.name if attachment.method.name in OPTIONS else "diffusers")()
    form.save(attachment, folder if form.folder else folder / form.file)
    return folder


def by_diffusers(family: str, method: str | None, control: Path, lora: Path | None) -> tuple[Any, dict[str, Any]]:
    """A bare pipeline with the saved files loaded, and its arguments."""
    plain, options = base(family), {}
    if lora is not None:
        plain.load_lora_weights(lora)
    if method == "ip_adapter":
        plain.load_ip_adapter(str(control), subfolder="", weight_name=formats.get(method).file, image_encoder_folder=None)
        plain.set_ip_adapter_scale(STRENGTH)
        options["ip_adapter_image_embeds"] = [torch.stack([torch.zeros_like(embeds()), embeds()])]
    elif method == "controlnet":
        net: Any = ControlNetModel.from_pretrained(control)
        plain = of(PIPELINES[method, family], plain, controlnet=net)
        options = {"image": picture(1), "controlnet_conditioning_scale": STRENGTH}
    elif method == "t2i_adapter":
        adapter: Any = T2IAdapter.from_pretrained(control)
        plain = of(PIPELINES[method, family], plain, adapter=adapter)
        options = {"image": picture(1), "adapter_conditioning_scale": STRENGTH}
    return plain, options


def of(kind: Any, pipe: Any, **more: Any) -> Any:
    """A pipeline of another kind with the same parts."""
    known = set(inspect.signature(kind.__init__).parameters)
    return kind(**{name: part for name, part in pipe.components.items() if name in known}, **more)


@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("method", OPTIONS)
def test_alone_and_with_a_lora(method: str, family: str, tmp_path: Path) -> None:
    pipe = base(family)
    torch.manual_seed(2)
    control = veneer.attach(pipe, method, **OPTIONS[method])
    lora = veneer.attach(pipe, "lora", rank=2)
    for n, attachment in enumerate((control, lora)):
        perturb(attachment, seed=n, size=0.3)
    files = written(control, tmp_path / "control"), written(lora, tmp_path / "lora")
    for use_control, use_lora in ((True, False), (False, True), (True, True)):
        with lora.enabled(use_lora), control.condition(**given(method), strength=STRENGTH * use_control):
            ours = drawn(pipe)
        plain, options = by_diffusers(family, method if use_control else None, files[0], files[1] if use_lora else None)
        np.testing.assert_allclose(ours, drawn(plain, **options), atol=1e-4)
        if use_control and use_lora:
            assert np.abs(ours - drawn(base(family))).max() > 0.01
