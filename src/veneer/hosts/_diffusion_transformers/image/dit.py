"""DiT: class-conditional transformer with adaptive norms (Peebles and Xie, 2023)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    side = 4 * model.config["patch_size"]
    return {
        "hidden_states": draw.normal(2, model.config["in_channels"], side, side),
        "timestep": draw.tensor([37, 801]),
        "class_labels": draw.tensor([1, 3]),
    }


BLOCK = (
    Modules("norm1"),
    Attention("attn1", norm="norm1"),
    Modules("norm3"),
    FeedForward(norm="norm3"),
    Stream("attn1", can_drop=True),
)
RECORD = TransformerRecord(
    classes=("DiTTransformer2DModel",),
    modules=("pos_embed", Blocks("transformer_blocks", BLOCK), "proj_out_1", "proj_out_2"),
    sample=_sample,
    tiny={
        "dit": {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
            "in_channels": 4, "num_embeds_ada_norm": 10,
        },
    },
)  # fmt: skip
