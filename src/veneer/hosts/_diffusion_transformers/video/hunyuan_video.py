"""HunyuanVideo: a refiner of the text, then the blocks of FLUX.1 over video tokens (Kong et al., 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..image.flux import SINGLE
from ..image.sd3 import JOINT
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    inputs = {
        "hidden_states": draw.normal(2, config["in_channels"], 2, 8, 8),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_hidden_states": draw.normal(2, 5, config["text_embed_dim"]),
        "encoder_attention_mask": draw.tensor([[1] * 5] * 2),
        "pooled_projections": draw.normal(2, config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = draw.tensor([1000.0, 3500.0], draw.dtype)
    return inputs


REFINER = (
    Modules("norm1"), Attention("attn", norm="norm1"), Modules("norm_out", "norm2"), FeedForward(norm="norm2"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("HunyuanVideoTransformer3DModel",),
    modules=(
        "time_text_embed", "x_embedder", "context_embedder.time_text_embed", "context_embedder.proj_in",
        Blocks("context_embedder.token_refiner.refiner_blocks", REFINER, "text"), Blocks("transformer_blocks", JOINT, "double"),
        Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={
        "hunyuan_video": {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
            "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 20,
            "rope_axes_dim": (4, 2, 2),
        },
    },
    full_size={"HunyuanVideo": ({}, 12_821_012_544)},
)  # fmt: skip
