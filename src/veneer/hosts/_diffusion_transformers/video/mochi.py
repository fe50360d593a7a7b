"""Mochi 1: joint attention over video and text streams of different widths (Genmo, 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(2, model.config["in_channels"], 2, 8, 8),
        "encoder_hidden_states": draw.normal(2, 5, model.config["text_embed_dim"]),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_attention_mask": draw.tensor([[True] * 5] * 2),
    }


JOINT = (
    Modules("norm1", "norm1_context"), Attention("attn1", norm="norm1", context_norm="norm1_context"), FeedForward(norm="norm3"),
    FeedForward("ff_context", norm="norm3_context", role="mlp.context"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("MochiTransformer3DModel",),
    modules=("time_embed", "patch_embed", "pos_frequencies", Blocks("transformer_blocks", JOINT), "norm_out", "proj_out"),
    sample=_sample,
    tiny={
        "mochi": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 12, "in_channels": 4,
            "text_embed_dim": 24, "time_embed_dim": 8,
        },
    },
    roles={
        "to_q": "pool.q", "to_kv": "pool.kv", "to_out": "pool.out", "caption_proj": "embed.context",
        "pos_frequencies": "embed.position",
    },
    full_size={"Mochi 1": ({}, 10_027_677_744)},
)  # fmt: skip
