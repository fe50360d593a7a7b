"""The record of `ClayTransformer`. Imports neither the model nor diffusers."""

from __future__ import annotations

from typing import Any

from veneer.transformer_records import Attention, Blocks, FeedForward, Modules, SampleInputs, Stream, TransformerRecord


def sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Inputs of a forward pass."""
    return {"hidden_states": draw.normal(2, 6, model.img_in.in_features), "timestep": draw.tensor([0.25, 0.75], draw.dtype)}


BLOCK = (Modules("norm1"), Attention("attn", norm="norm1"), Modules("norm2"), FeedForward(norm="norm2"), Stream("norm1"))
RECORD = TransformerRecord(
    classes=("ClayTransformer",),
    library="veneer_example.clay",
    modules=("img_in", "time_in", Blocks("blocks", BLOCK), "norm_out", "proj_out"),
    roles={"img_in": "embed.patch", "time_in": "time.embed", "proj_out": "proj.out"},
    sample=sample,
    tiny={"clay": {"width": 16, "heads": 2}},
)
