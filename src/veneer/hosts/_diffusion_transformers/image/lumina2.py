"""Lumina-Image 2: refiners of text and noise, then blocks over both with grouped-query attention (Qin et al., 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(2, model.config["in_channels"], 8, 8),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "encoder_hidden_states": draw.normal(2, 5, model.config["cap_feat_dim"]),
        "encoder_attention_mask": draw.tensor([[1] * 5] * 2),
    }


REFINER = (
    Modules("norm1"), Attention("attn", norm="norm1"), Modules("norm2", "ffn_norm1"),
    FeedForward("feed_forward", norm="ffn_norm1", layers={"linear_1": "gate", "linear_3": "in", "linear_2": "out"}),
    Modules("ffn_norm2"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("Lumina2Transformer2DModel",),
    modules=(
        "time_caption_embed", "x_embedder", Blocks("context_refiner", REFINER, "context_refiner"),
        Blocks("noise_refiner", REFINER, "noise_refiner"), Blocks("layers", (*REFINER, Stream("norm2")), "layers"), "norm_out",
    ),
    sample=_sample,
    tiny={
        "lumina2": {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 4, "axes_dim_rope": (2, 2, 2), "axes_lens": (16, 8, 8),
            "cap_feat_dim": 20,
        },
    },
    roles={"caption_embedder": "embed.context", "linear_1": "adaln", "linear_2": "proj.out"},
    full_size={"Lumina-Image 2": ({"cap_feat_dim": 2304}, 2_609_769_152)},
)  # fmt: skip
