"""Chroma: FLUX.1 without modulation layers; one approximator computes every modulation (Lodestone Rock, 2025)."""

from __future__ import annotations

from ..record import Blocks, TransformerRecord
from .flux import SINGLE, packed_inputs
from .sd3 import JOINT

RECORD = TransformerRecord(
    classes=("ChromaTransformer2DModel",),
    modules=(
        "x_embedder", "distilled_guidance_layer.in_proj", "distilled_guidance_layer.layers", "distilled_guidance_layer.norms",
        "distilled_guidance_layer.out_proj", "context_embedder", Blocks("transformer_blocks", JOINT, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=packed_inputs,
    tiny={
        "chroma": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2, "in_channels": 12,
            "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4), "approximator_num_channels": 16,
            "approximator_hidden_dim": 20, "approximator_layers": 1,
        },
    },
    roles={"distilled_guidance_layer": "adaln"},
    full_size={"Chroma": ({}, 8_899_983_424)},
)  # fmt: skip
