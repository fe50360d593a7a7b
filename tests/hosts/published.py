"""Hyper-parameters of published models, built on the meta device: real names, shapes and counts without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veneer.full_size_models import CLIP_BIGG, CLIP_L, DIT_XL_2, SD15, SDXL

SD21: dict[str, Any] = {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 96, "use_linear_projection": True,
    "upcast_attention": True,
}  # fmt: skip
SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
FLUX_DEV: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
PIXART_ALPHA: dict[str, Any] = {
    "sample_size": 128, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "num_layers": 28, "cross_attention_dim": 1152, "patch_size": 2, "caption_channels": 4096, "norm_type": "ada_norm_single",
}  # fmt: skip
CLIP_B: dict[str, Any] = {
    **CLIP_L, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512,
}  # fmt: skip
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def _diffusers(cls: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, cls)(**config)

    return build


def _transformers(cls: str, config_cls: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
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
    "sd3_medium": _diffusers("SD3Transformer2DModel", SD3_MEDIUM),
    "flux_dev": _diffusers("FluxTransformer2DModel", FLUX_DEV),
    "pixart_alpha": _diffusers("PixArtTransformer2DModel", PIXART_ALPHA),
    "dit_xl_2": _diffusers("DiTTransformer2DModel", DIT_XL_2),
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
