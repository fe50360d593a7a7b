"""LTX-Video: self- and cross-attention over packed latents, one modulation for all blocks (Lightricks, 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..._diffusers import AttentionNames
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(2, 8, model.config["in_channels"]),
        "encoder_hidden_states": draw.normal(2, 5, model.config["caption_channels"]),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_attention_mask": draw.tensor([[1] * 5] * 2),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


BLOCK = (
    Modules("scale_shift_table", "norm1"), Attention("attn1", norm="norm1"), Attention("attn2", names=AttentionNames(cross=True)),
    Modules("norm2"), FeedForward(norm="norm2"), Stream("attn1"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("LTXVideoTransformer3DModel",),
    modules=("proj_in", "time_embed", "caption_projection", Blocks("transformer_blocks", BLOCK), "scale_shift_table", "proj_out"),
    sample=_sample,
    tiny={
        "ltx": {
            "in_channels": 6, "out_channels": 6, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
            "num_layers": 2, "caption_channels": 20,
        },
    },
    roles={"proj_in": "embed.patch"},
    full_size={"LTX-Video 2B": ({}, 1_923_385_472)},
)  # fmt: skip
