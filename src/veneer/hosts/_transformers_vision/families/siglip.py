"""SigLIP's image tower, and SigLIP 2's of a fixed resolution (Zhai et al., 2023; Tschannen et al., 2025)."""

from __future__ import annotations

from ..._records.block_parts import Blocks, FeedForward, Single
from ..vision_parts import MLP, PooledAttention, SelfAttention, Tokens
from ..vision_record import Head, VisionRecord

BLOCK = (
    SelfAttention("self_attn", norm="layer_norm1", out="out_proj"),
    FeedForward("mlp", norm="layer_norm2", layers=MLP, plain_norm=True),
    Tokens("layer_norm1"),
)
TINY = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
MODULES = ("embeddings", Blocks("encoder.layers", BLOCK), "post_layernorm", Single("head", (PooledAttention(),)))
RECORD = VisionRecord(
    classes=("SiglipVisionModel",),
    modules=MODULES,
    heads={"SiglipForImageClassification": Head("vision_model", unused=("head.",))},
    with_text=("SiglipModel",),
    tiny={"siglip": TINY},
    full_size={"google/siglip-base-patch16-224": ({}, 92_884_224)},
)
