"""AuraFlow: joint blocks, then single-stream blocks, with learned positions and register tokens (fal, 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(2, model.config["in_channels"], 8, 8),
        "encoder_hidden_states": draw.normal(2, 5, model.config["joint_attention_dim"]),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
    }


SWIGLU = {"linear_1": "gate", "linear_2": "in", "out_projection": "out"}
JOINT = (
    Modules("norm1", "norm1_context"), Attention("attn", norm="norm1", context_norm="norm1_context"),
    FeedForward(norm="norm2", layers=SWIGLU),
    FeedForward("ff_context", norm="norm2_context", role="mlp.context", layers=SWIGLU),
)  # fmt: skip
SINGLE = (Modules("norm1"), Attention("attn", norm="norm1"), FeedForward(norm="norm2", layers=SWIGLU))
RECORD = TransformerRecord(
    classes=("AuraFlowTransformer2DModel",),
    modules=(
        "pos_embed", "time_step_proj", "context_embedder", "register_tokens", Blocks("joint_transformer_blocks", JOINT, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={
        "auraflow": {
            "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 16, "pos_embed_max_size": 16,
        },
    },
    roles={
        "proj": "embed.patch", "pos_embed": "embed.position", "time_step_proj": "time.embed", "register_tokens": "embed.register",
    },
    full_size={"AuraFlow 0.3": ({"pos_embed_max_size": 9216}, 6_858_605_568)},
)  # fmt: skip
