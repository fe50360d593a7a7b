"""Qwen-Image: double-stream blocks over image and text tokens (Qwen team, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(2, 16, model.config["in_channels"]),
        "encoder_hidden_states": draw.normal(2, 5, model.config["joint_attention_dim"]),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


JOINT = (
    Modules("img_mod", "txt_mod"),
    Attention("attn", norm="img_norm1", context_norm="txt_norm1"),
    FeedForward("img_mlp", norm="img_norm2"),
    FeedForward("txt_mlp", norm="txt_norm2", role="mlp.context"),
)
NO_EFFECT = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "attn.context", "txt_mlp")
RECORD = TransformerRecord(
    classes=("QwenImageTransformer2DModel",),
    modules=(
        "img_in", "txt_norm", "txt_in", "time_text_embed", Blocks("transformer_blocks", JOINT, last_inert=NO_EFFECT), "norm_out",
        "proj_out",
    ),
    sample=_sample,
    tiny={
        "qwen_image": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 12, "out_channels": 3,
            "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4),
        },
    },
    roles={"img_in": "embed.patch", "txt_in": "embed.context"},
    full_size={"Qwen-Image": ({}, 20_430_401_088)},
)  # fmt: skip
