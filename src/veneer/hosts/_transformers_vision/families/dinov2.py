"""DINOv2: ViT with layer scales, a gated feed-forward in the giant model (Oquab et al., 2024)."""

from __future__ import annotations

from ..._records.block_parts import Blocks, FeedForward
from ..vision_parts import MLP, SelfAttention, Tokens
from ..vision_record import Head, VisionRecord

BLOCK = (
    SelfAttention("attention", norm="norm1", scale="layer_scale1"),
    FeedForward("mlp", norm="norm2", layers=MLP, plain_norm=True, scale="layer_scale2"),
    Tokens("norm1"),
)
TINY = {"image_size": 28, "patch_size": 7, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
RECORD = VisionRecord(
    classes=("Dinov2Model",),
    modules=("embeddings", Blocks("encoder.layer", BLOCK), "layernorm"),
    heads={"Dinov2ForImageClassification": Head("dinov2")},
    tiny={"dinov2": TINY},
    full_size={
        "facebook/dinov2-base": ({"image_size": 518, "patch_size": 14}, 86_580_480),
        "facebook/dinov2-giant": ({"image_size": 518, "patch_size": 14, **GIANT}, 1_136_480_768),
    },
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
