"""Ovis-Image: FLUX.1's blocks with gated feed-forwards (AIDC-AI, 2025)."""

from __future__ import annotations

from ..image.flux import SINGLE, packed_inputs
from ..image.sd3 import JOINT
from ..record import Blocks, TransformerRecord

RECORD = TransformerRecord(
    classes=("OvisImageTransformer2DModel",),
    modules=(
        "x_embedder", "timestep_embedder", "context_embedder_norm", "context_embedder",
        Blocks("transformer_blocks", JOINT, "double"), Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out",
        "proj_out",
    ),
    sample=packed_inputs,
    tiny={
        "ovis_image": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 2, "in_channels": 12,
            "out_channels": 12, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4),
        },
    },
    full_size={"Ovis-Image 7B": ({}, 7_370_449_728)},
)  # fmt: skip
