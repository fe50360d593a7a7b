"""FLUX.1: double-stream blocks, then single-stream blocks of parallel attention and feed-forward (Black Forest Labs, 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, Branch, Modules
from ..record import Blocks, TransformerRecord
from .sd3 import JOINT


def packed_inputs(draw: SampleInputs, model: Any, axes: int = 3) -> dict[str, Any]:
    """Inputs of models that take packed latents with positions along `axes` axes."""
    config = model.config
    inputs = {
        "hidden_states": draw.normal(2, 16, config["in_channels"]),
        "encoder_hidden_states": draw.normal(2, 5, config["joint_attention_dim"]),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "img_ids": draw.tensor([[0.0, i // 4, i % 4, 0.0][:axes] for i in range(16)], draw.dtype),
        "txt_ids": draw.tensor([[0.0] * axes] * 5, draw.dtype),
    }
    if config.get("guidance_embeds", False):
        inputs["guidance"] = draw.tensor([1.0, 3.5], draw.dtype)
    return inputs


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {**packed_inputs(draw, model), "pooled_projections": draw.normal(2, model.config["pooled_projection_dim"])}


SINGLE = (
    Modules("norm"),
    Modules("proj_mlp", role="single.in"),
    Attention("attn", branch=False),
    Modules("proj_out", role="single.out"),
    Branch("single", "norm", "proj_out"),
)
RECORD = TransformerRecord(
    classes=("FluxTransformer2DModel",),
    modules=(
        "x_embedder", "time_text_embed", "context_embedder", Blocks("transformer_blocks", JOINT, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={
        "flux": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2, "in_channels": 12,
            "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True,
        },
    },
)  # fmt: skip
