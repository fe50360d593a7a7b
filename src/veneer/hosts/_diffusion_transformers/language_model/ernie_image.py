"""ERNIE-Image: blocks over image and text tokens with one modulation for all of them (Baidu, 2026)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": draw.normal(2, config["in_channels"], 4, 4),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "text_bth": draw.normal(2, 5, config["text_in_dim"]),
        "text_lens": draw.tensor([5, 5]),
    }


BLOCK = (
    Modules("adaLN_sa_ln"),
    Attention("self_attention"),
    Modules("adaLN_mlp_ln"),
    FeedForward("mlp", layers={"up_proj": "in", "gate_proj": "gate", "linear_fc2": "out"}, branch=False),
)
"""Tokens come before rows of the batch, except in the attention: other branches and the stream have no sites."""
RECORD = TransformerRecord(
    classes=("ErnieImageTransformer2DModel",),
    modules=(
        "x_embedder", "text_proj", "time_embedding", "adaLN_modulation", Blocks("layers", BLOCK), "final_norm", "final_linear",
    ),
    sample=_sample,
    tiny={
        "ernie_image": {
            "in_channels": 12, "out_channels": 12, "hidden_size": 16, "num_attention_heads": 2, "num_layers": 2,
            "ffn_hidden_size": 28, "text_in_dim": 24, "rope_axes_dim": (4, 2, 2),
        },
    },
    roles={
        "text_proj": "embed.context", "time_embedding": "time.embed", "adaLN_modulation": "adaln", "final_linear": "proj.out",
    },
    full_size={
        "ERNIE-Image": (
            {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288, "text_in_dim": 3072},
            8_033_490_048,
        ),
    },
)  # fmt: skip
