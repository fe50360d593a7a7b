"""LongCat-Image: FLUX.1's blocks without a pooled text embedding (Meituan, 2025)."""

from __future__ import annotations

from ..record import Blocks, TransformerRecord
from .flux import SINGLE, packed_inputs
from .sd3 import JOINT

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 2, "in_channels": 12,
    "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
RECORD = TransformerRecord(
    classes=("LongCatImageTransformer2DModel",),
    modules=(
        "x_embedder", "time_embed", "context_embedder", Blocks("transformer_blocks", JOINT, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=packed_inputs,
    tiny={"longcat_image": TINY},
)  # fmt: skip
