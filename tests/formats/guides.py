"""Tiny UNets with three levels, their inputs, and whole control networks as shapes without values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from veneer.formats import File, format_of
from veneer.hosts.diffusers_unet import DiffusersUNet
from veneer.injection import Attachment

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"down_block_types": (CROSS, CROSS, PLAIN), "cross_attention_dim": 24, "attention_head_dim": 2},
    "sdxl": {
        "down_block_types": (PLAIN, CROSS, CROSS), "cross_attention_dim": 40, "attention_head_dim": (1, 2, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68, "transformer_layers_per_block": (1, 1, 2),
    },
}  # fmt: skip
# at real widths; of SDXL with fewer transformers, which change no shape
REAL: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        **KINDS["sdxl"], "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": 1, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


def mirrored(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a UNet with the up blocks that correspond to the down blocks."""
    down = options.get("down_block_types", (CROSS, CROSS, CROSS, PLAIN))
    return {**options, "down_block_types": down, "up_block_types": tuple(d.replace("Down", "Up") for d in reversed(down))}


def tiny(kind: str, seed: int = 0, **options: Any) -> Any:
    """A UNet of 8, 16 and 16 channels."""
    shape = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = UNet2DConditionModel(**mirrored({**shape, **KINDS[kind], **options}))
    return made.eval()


def real(kind: str) -> Any:
    """A UNet of a real model's widths, without values."""
    with torch.device("meta"):
        made: Any = UNet2DConditionModel(**mirrored(REAL[kind]))
    return made.eval()


def picture(channels: int = 3) -> Tensor:
    """Images for the two samples of `inputs`."""
    return torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(11))


def inputs(unet: nn.Module) -> dict[str, Any]:
    return DiffusersUNet().sample(unet)


@torch.no_grad()
def output(unet: Any, **more: Any) -> Tensor:
    """Output of the bare UNet, with residuals computed by another class."""
    found: Tensor = unet(**inputs(unet), **more).sample
    return found


@torch.no_grad()
def guided(unet: Any, attachment: Attachment, **conditions: Any) -> Tensor:
    """Output with an attachment."""
    with attachment.condition(**conditions):
        return output(unet)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Assert equality up to float32 rounding."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def trained(module: Any, seed: int = 3) -> Any:
    """Set values as after training, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval() if isinstance(module, nn.Module) else module


def form(file: File) -> str | None:
    """The format that reads a file."""
    found = format_of(file)
    return None if found is None else found.name


def paper(shapes: Mapping[str, Any], path: Path = Path("x.safetensors")) -> File:
    """A file of these shapes whose tensors are never read."""
    return File(path, {}, {key: tuple(getattr(shape, "shape", shape)) for key, shape in shapes.items()})
