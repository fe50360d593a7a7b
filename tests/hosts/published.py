"""Hyper-parameters of published models, built on the meta device: real names, shapes and counts without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veneer.base_models.architectures import CLIP_BIGG, CLIP_L, DIT, FLUX, PIXART, SD3, SD15, SD21, SDXL, T5_XXL, Config

CLIP_B: dict[str, Any] = {
    **CLIP_L, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512,
}  # fmt: skip


def _diffusers(cls: str, config: Config) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, cls)(**config)

    return build


def _transformers(cls: str, config_cls: str, config: Config) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, cls)(getattr(transformers, config_cls)(**config))

    return build


def _timm(architecture: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(architecture, pretrained=False)

    return build


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "sd15": _diffusers("UNet2DConditionModel", SD15),
    "sd21": _diffusers("UNet2DConditionModel", SD21),
    "sdxl": _diffusers("UNet2DConditionModel", SDXL),
    "sd3_medium": _diffusers("SD3Transformer2DModel", SD3),
    "flux_dev": _diffusers("FluxTransformer2DModel", FLUX),
    "pixart_alpha": _diffusers("PixArtTransformer2DModel", PIXART),
    "dit_xl_2": _diffusers("DiTTransformer2DModel", DIT),
    "clip_l": _transformers("CLIPTextModel", "CLIPTextConfig", CLIP_L),
    "clip_b": _transformers("CLIPTextModel", "CLIPTextConfig", CLIP_B),
    "clip_bigg": _transformers("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_BIGG),
    "t5_xxl": _transformers("T5EncoderModel", "T5Config", T5_XXL),
    "vit_b": _timm("vit_base_patch16_224"),
    "swin_b": _timm("swin_base_patch4_window7_224"),
    "swinv2_b": _timm("swinv2_base_window8_256"),
    "convnext_b": _timm("convnext_base"),
    "convnextv2_b": _timm("convnextv2_base"),
    "resnet50": _timm("resnet50"),
    "resnext50": _timm("resnext50_32x4d"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "efficientnet_lite0": _timm("tf_efficientnet_lite0"),
    "mobilenetv3": _timm("mobilenetv3_large_100"),
    "mobilenetv4": _timm("mobilenetv4_hybrid_medium"),
    "regnety_16": _timm("regnety_016"),
}


def build(name: str) -> nn.Module:
    """A published model on the meta device."""
    with torch.device("meta"):
        return BUILDERS[name]()
