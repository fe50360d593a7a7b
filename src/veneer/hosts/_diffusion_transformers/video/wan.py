"""Wan 2.1 and 2.2: self-attention, cross-attention to text and, from image to video, to an image (Wan team, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord

TEXT_TOKENS = 512  # with an image, attention splits the context there


def sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Inputs of Wan and SkyReels-V2."""
    config = model.config
    inputs = {
        "hidden_states": draw.normal(2, config["in_channels"], 2, 8, 8),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_hidden_states": draw.normal(2, TEXT_TOKENS if config["image_dim"] else 5, config["text_dim"]),
    }
    if config["image_dim"]:
        inputs["encoder_hidden_states_image"] = draw.normal(2, 4, config["image_dim"])
    return inputs


BLOCK = (
    Modules("scale_shift_table"), Attention("attn1", norm="norm1"), Modules("norm2"), Attention("attn2", norm="norm2"),
    FeedForward("ffn", norm="norm3"), Stream("attn1"),
)  # fmt: skip
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20, "freq_dim": 8,
    "ffn_dim": 28, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip
SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
TEXT_IMAGE = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
RECORD = TransformerRecord(
    classes=("WanTransformer3DModel",),
    modules=("patch_embedding", "condition_embedder", Blocks("blocks", BLOCK), "scale_shift_table", "proj_out"),
    sample=sample,
    tiny={"wan": TINY, "wan_image": {**TINY, "image_dim": 16, "added_kv_proj_dim": 24}},
    roles={
        "patch_embedding": "embed.patch", "time_embedder": "time.embed", "time_proj": "adaln", "text_embedder": "embed.context",
        "image_embedder": "embed.context",
    },
    full_size={
        "Wan 2.1 1.3B": (SMALL, 1_418_996_800), "Wan 2.2 5B": (TEXT_IMAGE, 4_999_787_712), "Wan 2.1 14B": ({}, 14_288_491_584),
        "Wan 2.1 14B, image to video": (IMAGE, 16_394_878_784),
    },
)  # fmt: skip
