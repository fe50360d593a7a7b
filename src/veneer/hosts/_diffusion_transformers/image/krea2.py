"""Krea 2: gated attention over text and image tokens, after a fusion of several layers of the text model (Krea, 2026)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": draw.normal(2, 16, config["in_channels"]),
        "encoder_hidden_states": draw.normal(2, 5, config["num_text_layers"], config["text_hidden_dim"]),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "position_ids": draw.tensor([[0, 0, 0]] * 5 + [[0, i // 4, i % 4] for i in range(16)]),
    }


FUSION = (
    Modules("norm1"), Attention("attn", norm="norm1"), Modules("norm2"),
    FeedForward(norm="norm2", layers={"gate": "gate", "up": "in", "down": "out"}),
)  # fmt: skip
BLOCK = (Modules("scale_shift_table"), *FUSION, Stream("norm2"))
RECORD = TransformerRecord(
    classes=("Krea2Transformer2DModel",),
    modules=(
        "time_embed", "time_mod_proj", Blocks("text_fusion.layerwise_blocks", FUSION, "text_layers"), "text_fusion.projector",
        Blocks("text_fusion.refiner_blocks", FUSION, "text"), "txt_in", "img_in", Blocks("transformer_blocks", BLOCK, "image"),
        "final_layer",
    ),
    sample=_sample,
    tiny={
        "krea2": {
            "in_channels": 12, "num_layers": 2, "attention_head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 28, "timestep_embed_dim": 8, "text_hidden_dim": 20, "num_text_layers": 3,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 36,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (2, 2, 2),
        },
    },
    roles={
        "time_embed": "time.embed", "time_mod_proj": "adaln", "projector": "embed.context", "txt_in": "embed.context",
        "img_in": "embed.patch", "scale_shift_table": "adaln.table", "linear": "proj.out",
    },
    full_size={"Krea 2": ({}, 12_820_073_036)},
)  # fmt: skip
