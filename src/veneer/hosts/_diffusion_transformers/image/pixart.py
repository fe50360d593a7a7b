"""PixArt-alpha and -sigma: cross-attention to T5, and one modulation for all blocks (Chen et al., 2024)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Inputs of PixArt and Sana."""
    config = model.config
    width = config["cross_attention_dim"] if config["caption_channels"] is None else config["caption_channels"]
    side = 4 * config["patch_size"]
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(2, config["in_channels"], side, side),
        "timestep": draw.tensor([37, 801]),
        "encoder_hidden_states": draw.normal(2, 5, width),
    }
    if getattr(model, "use_additional_conditions", False):
        inputs["added_cond_kwargs"] = {"resolution": draw.normal(2, 2), "aspect_ratio": draw.normal(2, 1)}
    if config.get("guidance_embeds", False):
        inputs["guidance"] = draw.normal(2).abs()
    return inputs


BLOCK = (
    Modules("scale_shift_table", "norm1"),
    Attention("attn1", norm="norm1"),
    Attention("attn2"),
    Modules("norm2"),
    FeedForward(norm="norm2"),
    Stream("attn1", can_drop=True),
)
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "in_channels": 4,
    "caption_channels": 12, "cross_attention_dim": 16,
}  # fmt: skip
RECORD = TransformerRecord(
    classes=("PixArtTransformer2DModel",),
    modules=(
        "pos_embed", "adaln_single", "caption_projection", Blocks("transformer_blocks", BLOCK), "scale_shift_table", "proj_out",
    ),
    sample=sample,
    tiny={"pixart": {**TINY, "patch_size": 2, "out_channels": 8}},
)  # fmt: skip
