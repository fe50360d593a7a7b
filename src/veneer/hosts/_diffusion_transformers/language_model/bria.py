"""Bria 3: FLUX.1's blocks without a pooled text embedding (Bria, 2025)."""

from __future__ import annotations

from ..image.flux import SINGLE, packed_inputs
from ..image.sd3 import JOINT
from ..record import Blocks, TransformerRecord

RECORD = TransformerRecord(
    classes=("BriaTransformer2DModel",),
    modules=(
        "x_embedder", "time_embed", "context_embedder", Blocks("transformer_blocks", JOINT, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=packed_inputs,
    tiny={
        "bria": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 2, "in_channels": 12,
            "joint_attention_dim": 24, "axes_dims_rope": [0, 4, 4],
        },
    },
    full_size={"Bria with the default config": ({}, 11_879_375_936)},
)  # fmt: skip
