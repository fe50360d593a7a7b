"""DINOv3: ViT with register tokens and rotated keys of patches, gated in the larger models (Siméoni et al., 2025).

The first tokens are not rotated, however many they are, so tokens can be inserted after them.
"""

from __future__ import annotations

from ..._records.block_parts import Blocks, FeedForward
from ..vision_parts import MLP, SelfAttention, Tokens
from ..vision_record import VisionRecord

BLOCK = (
    SelfAttention("attention", norm="norm1", scale="layer_scale1", rotary=True),
    FeedForward("mlp", norm="norm2", layers=MLP, plain_norm=True, scale="layer_scale2"),
    Tokens("norm1", rotary=True),
)
TINY = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "num_register_tokens": 2, "key_bias": True,
}  # fmt: skip
RECORD = VisionRecord(
    classes=("DINOv3ViTModel",),
    modules=("embeddings", Blocks("model.layer", BLOCK), "norm"),
    tiny={"dinov3": {**TINY, "use_gated_mlp": True}},
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
