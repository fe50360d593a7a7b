"""Stable Diffusion 3 and 3.5: joint attention over image and text tokens (Esser et al., 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    side = 4 * config["patch_size"]
    return {
        "hidden_states": draw.normal(2, config["in_channels"], side, side),
        "timestep": draw.tensor([37, 801]),
        "encoder_hidden_states": draw.normal(2, 5, config["joint_attention_dim"]),
        "pooled_projections": draw.normal(2, config["pooled_projection_dim"]),
    }


JOINT = (
    Modules("norm1", "norm1_context"),
    Attention("attn", norm="norm1", context_norm="norm1_context"),
    Attention("attn2", norm="norm1"),
    Modules("norm2"),
    FeedForward(norm="norm2"),
    Modules("norm2_context"),
    FeedForward("ff_context", norm="norm2_context", role="mlp.context"),
)
RECORD = TransformerRecord(
    classes=("SD3Transformer2DModel",),
    modules=("pos_embed", "time_text_embed", "context_embedder", Blocks("transformer_blocks", JOINT), "norm_out", "proj_out"),
    sample=_sample,
    tiny={
        "sd3": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
            "in_channels": 4, "joint_attention_dim": 24, "pooled_projection_dim": 20, "caption_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
    },
)  # fmt: skip
