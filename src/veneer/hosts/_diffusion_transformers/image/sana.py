"""Sana: linear attention, and feed-forwards of convolutions (Xie et al., 2025)."""

from __future__ import annotations

from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord
from .pixart import TINY, sample

BLOCK = (
    Modules("scale_shift_table", "norm1"),
    Attention("attn1", norm="norm1"),
    Attention("attn2"),
    Modules("norm2"),
    FeedForward(layers={"conv_inverted": "in", "conv_depth": "conv", "conv_point": "out"}, layout="NCHW"),
    Stream("attn1"),
)
RECORD = TransformerRecord(
    classes=("SanaTransformer2DModel",),
    modules=(
        "patch_embed", "time_embed", "caption_projection", "caption_norm", Blocks("transformer_blocks", BLOCK),
        "scale_shift_table", "norm_out", "proj_out",
    ),
    sample=sample,
    tiny={"sana": {**TINY, "num_cross_attention_heads": 4, "cross_attention_head_dim": 4, "patch_size": 1, "out_channels": 4}},
)  # fmt: skip
