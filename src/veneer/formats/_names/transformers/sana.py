"""Sana: PixArt's attention, and feed-forwards of convolutions. Source: diffusers `loaders/single_file_utils.py`; NVlabs/Sana."""

from __future__ import annotations

from .pixart import ATTENTIONS, CAPTION
from .record import BlockNames, TransformerNames, two_layers

CONVOLUTIONS = {
    f"mlp.{name}.conv": (f"ff.{own}",)
    for name, own in (("inverted_conv", "conv_inverted"), ("depth_conv", "conv_depth"), ("point_conv", "conv_point"))
}
RECORD = TransformerNames(
    classes=("SanaTransformer2DModel",),
    blocks=(BlockNames("transformer_blocks", "blocks", {**ATTENTIONS, **CONVOLUTIONS}),),
    modules={
        **two_layers("time_embed.emb.timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        **CAPTION, "x_embedder.proj": ("patch_embed.proj",), "t_block.1": ("time_embed.linear",),
        "final_layer.linear": ("proj_out",),
    },
)  # fmt: skip
