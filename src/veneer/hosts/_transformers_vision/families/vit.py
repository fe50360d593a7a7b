"""ViT (Dosovitskiy et al., 2021), and MAE and DINO encoders in its classes."""

from __future__ import annotations

from ..._records.block_parts import Blocks, FeedForward
from ..vision_parts import MLP, SelfAttention, Tokens
from ..vision_record import Head, VisionRecord

BLOCK = (
    SelfAttention("attention", norm="layernorm_before"),
    FeedForward("mlp", norm="layernorm_after", layers=MLP, plain_norm=True),
    Tokens("layernorm_before"),
)
TINY = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
RECORD = VisionRecord(
    classes=("ViTModel",),
    modules=("embeddings", Blocks("layers", BLOCK), "layernorm", "pooler"),
    heads={"ViTForImageClassification": Head("vit")},
    options={"add_pooling_layer": False},
    tiny={"vit": TINY},
    full_size={"google/vit-base-patch16-224-in21k": ({}, 85_798_656)},
)
