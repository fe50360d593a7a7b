"""Kandinsky 5: blocks over text, then blocks over images or videos with cross-attention to it (Kandinsky Lab, 2025)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..._describe import SampleInputs
from ..._diffusers import AttentionNames
from ..._records.block_parts import Single
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Videos of two frames, each in the dtype of the layer that reads it."""
    config = model.config
    channels = math.prod(config["patch_size"]) * config["in_visual_dim"]
    patches = draw.normal(2, 2, 2, 2, channels).unflatten(-1, (*config["patch_size"], -1))
    frames = patches.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return {
        "hidden_states": _like(frames, model.visual_embeddings),
        "encoder_hidden_states": _like(draw.normal(2, 5, config["in_text_dim"]), model.text_embeddings),
        "timestep": draw.tensor([37.0, 801.0]),
        "pooled_projections": _like(draw.normal(2, config["in_text_dim2"]), model.pooled_text_embeddings),
        "visual_rope_pos": [draw.tensor([0, 1])] * 3,
        "text_rope_pos": draw.tensor([*range(5)]),
    }


def _like(values: Tensor, embeddings: Any) -> Tensor:
    return values.to(embeddings.in_layer.weight.dtype)


SELF = AttentionNames(
    projections=("to_query", "to_key", "to_value"), out=("out_layer",), norms=("query_norm", "key_norm"), cross=False, rotary=True
)
CROSS = replace(SELF, cross=True, rotary=False)
SELF_ATTENTION = Attention("self_attention", norm="self_attention_norm", names=SELF)
FEED_FORWARD = FeedForward("feed_forward", norm="feed_forward_norm", layers={"in_layer": "in", "out_layer": "out"})
STREAM = Stream("feed_forward.in_layer")
TEXT = Modules("text_modulation"), SELF_ATTENTION, FEED_FORWARD, STREAM
VISUAL = (
    Modules("visual_modulation"), SELF_ATTENTION, Attention("cross_attention", norm="cross_attention_norm", names=CROSS),
    FEED_FORWARD, STREAM,
)  # fmt: skip
IMAGE = {
    "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50,
    "axes_dims": (32, 48, 48),
}  # fmt: skip
RECORD = TransformerRecord(
    classes=("Kandinsky5Transformer3DModel",),
    modules=(
        "text_embeddings", "time_embeddings", "pooled_text_embeddings", "visual_embeddings",
        Blocks("text_transformer_blocks", TEXT, "text"), Blocks("visual_transformer_blocks", VISUAL, "visual"),
        Single("out_layer", (Modules("modulation"), Modules("out_layer", role="proj.out"))),
    ),
    sample=_sample,
    tiny={
        "kandinsky5": {
            "in_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 18, "time_dim": 16, "out_visual_dim": 4, "model_dim": 24,
            "ff_dim": 28, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
        },
    },
    roles={
        "text_embeddings": "embed.context", "time_embeddings": "time.embed", "pooled_text_embeddings": "embed.context",
        "visual_embeddings": "embed.patch",
    },
    float32=("time_embeddings", "pooled_text_embeddings", "modulation"),
    full_size={"Kandinsky 5.0 Image Lite": (IMAGE, 6_022_080_576)},
)  # fmt: skip
