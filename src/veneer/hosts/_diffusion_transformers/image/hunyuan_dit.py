"""HunyuanDiT: cross-attention to CLIP and T5, and skip connections between blocks (Li et al., 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..._diffusers import AttentionNames
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    tokens, width = config["text_len"], config["attention_head_dim"]
    angles = draw.normal(16, width)
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(2, config["in_channels"], 4 * config["patch_size"], 4 * config["patch_size"]),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_hidden_states": draw.normal(2, tokens, config["cross_attention_dim"]),
        "text_embedding_mask": draw.tensor([[1] * (tokens - 1) + [0]] * 2),
        "encoder_hidden_states_t5": draw.normal(2, config["text_len_t5"], config["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": draw.tensor([[1] * (config["text_len_t5"] - 1) + [0]] * 2),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    if config["use_style_cond_and_image_meta_size"]:
        inputs |= {"image_meta_size": draw.normal(2, 6).abs(), "style": draw.tensor([0, 0])}
    return inputs


BLOCK = (
    Modules("skip_norm"), Modules("skip_linear", role="proj.in"), Modules("norm1"),
    Attention("attn1", norm="norm1", names=AttentionNames(rotary=True)), Modules("norm2"), Attention("attn2", norm="norm2"),
    Modules("norm3"), FeedForward(norm="norm3"), Stream("norm3"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("HunyuanDiT2DModel",),
    modules=(
        "pos_embed", "time_extra_emb", "text_embedder", "text_embedding_padding", Blocks("blocks", BLOCK), "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={
        "hunyuan_dit": {
            "num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "num_layers": 4, "sample_size": 8,
            "patch_size": 2, "in_channels": 4, "cross_attention_dim": 12, "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 20, "text_len": 5, "text_len_t5": 4,
        },
    },
    roles={
        "text_embedder": "embed.context", "style_embedder": "class.embed", "extra_embedder": "time.embed", "q_proj": "pool.q",
        "k_proj": "pool.k", "v_proj": "pool.v", "c_proj": "pool.out", "positional_embedding": "embed.pool",
    },
    inert_biases=(".k_proj",),
    read=("q_proj", "k_proj", "v_proj", "c_proj"),
)  # fmt: skip
