"""CogView4: text and image tokens share every weight of a block (Z.ai, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..._diffusers import AttentionNames
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    sizes = {name: draw.tensor([[64.0, 48.0]] * 2, draw.dtype) for name in ("original_size", "target_size", "crop_coords")}
    return {
        "hidden_states": draw.normal(2, model.config["in_channels"], 8, 8),
        "encoder_hidden_states": draw.normal(2, 5, model.config["text_embed_dim"]),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        **sizes,
    }


BLOCK = (
    Modules("norm1"), Attention("attn1", norm="norm1", names=AttentionNames(rotary=True)), FeedForward(),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("CogView4Transformer2DModel",),
    modules=("patch_embed", "time_condition_embed", Blocks("transformer_blocks", BLOCK), "norm_out", "proj_out"),
    sample=_sample,
    tiny={
        "cogview4": {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "text_embed_dim": 24, "time_embed_dim": 20, "condition_dim": 4, "sample_size": 8, "rope_axes_dim": (8, 8),
        },
    },
    roles={"text_proj": "embed.context", "condition_embedder": "time.embed"},
    full_size={"CogView4 6B": ({"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}, 6_369_118_272)},
)  # fmt: skip
