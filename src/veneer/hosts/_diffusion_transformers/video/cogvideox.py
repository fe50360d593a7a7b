"""CogVideoX: text and video tokens share every weight of a block; positions are added or rotated (Yang et al., 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    side, frames = config["sample_height"], (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(2, frames, config["in_channels"], side, side),
        "encoder_hidden_states": draw.normal(2, config["max_text_seq_length"], config["text_embed_dim"]),
        "timestep": draw.tensor([37, 801]),
    }
    if config["use_rotary_positional_embeddings"]:
        angles = draw.normal(frames * (side // config["patch_size"]) ** 2, config["attention_head_dim"])
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return inputs


BLOCK = (
    Modules("norm1"), Attention("attn1", norm="norm1", rotary="use_rotary_positional_embeddings"), Modules("norm2"),
    FeedForward(),
)  # fmt: skip
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
    "text_embed_dim": 20, "num_layers": 2, "attention_bias": True, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": 5,
}  # fmt: skip
LARGE = {
    "num_attention_heads": 48, "num_layers": 42, "attention_bias": True, "use_rotary_positional_embeddings": True,
}  # fmt: skip
RECORD = TransformerRecord(
    classes=("CogVideoXTransformer3DModel",),
    modules=(
        "time_embedding", "patch_embed.text_proj", "patch_embed.proj", Blocks("transformer_blocks", BLOCK), "norm_final",
        "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={"cogvideox": TINY, "cogvideox_rotary": {**TINY, "use_rotary_positional_embeddings": True}},
    roles={"time_embedding": "time.embed", "text_proj": "embed.context"},
    full_size={"CogVideoX 5B": (LARGE, 5_570_283_072)},
)  # fmt: skip
