"""Configs of published diffusion transformers whose text encoders take no adapters of other tools, but for Chroma's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TransformerConfig = tuple[str, Mapping[str, Any]]
"""Class in diffusers and its config; entries that are missing have the class's defaults."""
FLUX2_KLEIN = {"guidance_embeds": False}
CHROMA: TransformerConfig = ("ChromaTransformer2DModel", {})
TRANSFORMERS: dict[str, TransformerConfig] = {
    "flux2": ("Flux2Transformer2DModel", {}),
    "flux2-klein-4b": (
        "Flux2Transformer2DModel",
        {**FLUX2_KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "flux2-klein-9b": (
        "Flux2Transformer2DModel",
        {**FLUX2_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "z-image": ("ZImageTransformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "wan-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-5b": (
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ),
    "wan-14b": ("WanTransformer3DModel", {}),
    "wan-14b-i2v": ("WanTransformer3DModel", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "krea-2": ("Krea2Transformer2DModel", {}),
    "sana": ("SanaTransformer2DModel", {}),
}
"""Architecture to its transformer."""
