"""FLUX.2: one modulation for all blocks, and single-stream blocks with one input layer (Black Forest Labs, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, Branch, FeedForward, FusedAttention
from ..record import Blocks, TransformerRecord
from .flux import packed_inputs


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return packed_inputs(draw, model, axes=4)


def _rows(attn: Any) -> dict[str, tuple[str, int]]:
    """Rows of `to_qkv_mlp_proj`: queries, keys, values, then gate and input of the feed-forward."""
    heads, hidden = attn.inner_dim, attn.mlp_hidden_dim
    return {
        "to_q": ("attn.q", heads), "to_k": ("attn.k", heads), "to_v": ("attn.v", heads), "gate": ("mlp.gate", hidden),
        "up": ("mlp.in", hidden),
    }  # fmt: skip


SWIGLU = {"linear_in": "in_gate", "linear_out": "out"}
DOUBLE = (
    Attention("attn", norm="norm1", context_norm="norm1_context"),
    FeedForward(norm="norm2", layers=SWIGLU),
    FeedForward("ff_context", norm="norm2_context", role="mlp.context", layers=SWIGLU),
)
SINGLE = (
    FusedAttention(
        "attn", "to_qkv_mlp_proj", _rows, whole="single.in",
        layers={"norm_q": "norm.qk", "norm_k": "norm.qk", "to_out": "single.out"},
    ),
    Branch("single", "norm", "attn.to_out"),
)  # fmt: skip
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2, "in_channels": 12,
    "joint_attention_dim": 24, "timestep_guidance_channels": 20, "axes_dims_rope": (2, 2, 2, 2),
}  # fmt: skip
RECORD = TransformerRecord(
    classes=("Flux2Transformer2DModel",),
    modules=(
        "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
        "x_embedder", "context_embedder", Blocks("transformer_blocks", DOUBLE, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={"flux2": TINY},
    full_size={"FLUX.2 dev": ({}, 32_223_281_152)},
)  # fmt: skip
