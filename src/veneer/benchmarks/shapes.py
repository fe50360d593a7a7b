"""Models of the benchmarks by size, built from configs with random weights, without downloads."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from veneer.base_models.architectures import FLUX, SD15
from veneer.injection.errors import VeneerError

M = TypeVar("M", bound=nn.Module)

_TINY_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 2, "cross_attention_dim": 24,
}  # fmt: skip
_SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640), "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "attention_head_dim": 8,
    "cross_attention_dim": 768,
}  # fmt: skip
_TINY_FLUX: dict[str, Any] = {
    "in_channels": 24, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 60, "pooled_projection_dim": 28, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


class BenchError(VeneerError):
    """A benchmark cannot be run with these options."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark.

    Args:
        unet, flux: configs of the UNet (diffusers' defaults are the widths of SD 1.5) and of the FLUX transformer (those of
            FLUX.1).
        latent: side of the UNet's input. `tokens`: length of the prompt.
        calls: steps per timing.
        vit, base_vit, large_vit: timm models. `images`: batch size of `vit`, `few_images` of `base_vit`.
        block: side of OFT's blocks.
        photos, steps, resolution: of the few-photo training.
    """

    unet: dict[str, Any]
    latent: int
    tokens: int = 77
    calls: int = 1
    vit: str = "vit_small_patch16_224"
    base_vit: str = "vit_base_patch16_224"
    large_vit: str = "vit_large_patch16_224"
    images: int = 8
    few_images: int = 4
    block: int = 32
    flux: dict[str, Any] = field(default_factory=lambda: dict(FLUX))
    photos: int = 5
    steps: int = 20
    resolution: int | None = None


SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        _TINY_UNET,
        latent=8,
        tokens=4,
        vit="test_vit",
        base_vit="test_vit",
        large_vit="test_vit",
        images=2,
        few_images=2,
        block=8,
        flux=_TINY_FLUX,
        photos=2,
        steps=2,
    ),
    "small": Shape(_SMALL_UNET, latent=32, calls=2),
    "sd15": Shape(dict(SD15), latent=32),
}


def unet(config: dict[str, Any], latent: int, dtype: torch.dtype, seed: int) -> nn.Module:
    """A frozen UNet in training mode, with random weights."""
    return _frozen(lambda: _diffusers("UNet2DConditionModel")(**config, sample_size=latent), dtype, seed)


def vit(name: str, dtype: torch.dtype, seed: int) -> Any:
    """A frozen timm model in training mode, with random weights."""
    return _frozen(lambda: importlib.import_module("timm").create_model(name), dtype, seed)


def place() -> torch.device:
    """The device of the benchmarks: a CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _frozen(build: Callable[[], nn.Module], dtype: torch.dtype, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    if dtype != torch.float32:
        model.to(dtype)
    return model.to(place()).requires_grad_(False).train()


def flux(config: dict[str, Any]) -> nn.Module:
    """A FLUX transformer on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        model: nn.Module = _diffusers("FluxTransformer2DModel")(**config)
    return model


def sharing(model: M) -> M:
    """A copy of the modules that shares all tensors, so that contenders differ in their adapters only."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _diffusers(name: str) -> Any:
    return getattr(importlib.import_module("diffusers"), name)
