"""Ideogram 4: blocks over one sequence of text and image tokens, with scales and gates by the time (Ideogram, 2026)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord

TEXT, IMAGE = 3, 2
"""Values of `indicator`."""


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Five tokens of text, then 2×2 patches."""
    config = model.config
    tokens = 5 + 2 * 2
    text, image = [[i, i, i] for i in range(5)], [[0, i, j] for i in (8, 9) for j in (8, 9)]
    return {
        "hidden_states": draw.normal(2, tokens, config["in_channels"]),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "encoder_hidden_states": draw.normal(2, tokens, config["llm_features_dim"]),
        "position_ids": draw.tensor([text + image] * 2),
        "segment_ids": draw.tensor([[1] * tokens] * 2),
        "indicator": draw.tensor([[TEXT] * 5 + [IMAGE] * 4] * 2),
    }


BLOCK = (
    Modules("adaln_modulation"),
    Modules("attention_norm1"),
    Attention("attention", norm="attention_norm1"),
    Modules("attention_norm2"),
    Modules("ffn_norm1"),
    FeedForward("feed_forward", norm="ffn_norm1", layers={"w1": "gate", "w3": "in", "w2": "out"}),
    Modules("ffn_norm2"),
    Stream("attention_norm1"),
)
RECORD = TransformerRecord(
    classes=("Ideogram4Transformer2DModel",),
    modules=(
        "input_proj", "t_embedding", "adaln_proj", "llm_cond_norm", "llm_cond_proj", "embed_image_indicator",
        Blocks("layers", BLOCK), "final_layer.adaln_modulation", "final_layer.linear",
    ),
    sample=_sample,
    tiny={
        "ideogram4": {
            "in_channels": 12, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "intermediate_size": 28,
            "adaln_dim": 16, "llm_features_dim": 20, "rope_theta": 10000, "mrope_section": (2, 2, 2),
        },
    },
    roles={
        "t_embedding": "time.embed", "adaln_proj": "time.embed", "input_proj": "embed.patch", "llm_cond_proj": "embed.context",
        "embed_image_indicator": "embed.token", "adaln_modulation": "adaln", "linear": "proj.out",
    },
    full_size={"Ideogram 4": ({}, 9_279_288_448)},
)  # fmt: skip
