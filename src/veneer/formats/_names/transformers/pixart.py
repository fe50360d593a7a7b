"""PixArt-α and -Σ. Source: PixArt-alpha/PixArt-alpha `diffusion/model/nets`, `tools/convert_pixart_alpha_to_diffusers.py`."""

from __future__ import annotations

from .record import BlockNames, Paths, TransformerNames, two_layers

ATTENTIONS: Paths = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
}  # fmt: skip
CAPTION: Paths = two_layers("caption_projection", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2")
RECORD = TransformerNames(
    classes=("PixArtTransformer2DModel",),
    blocks=(
        BlockNames("transformer_blocks", "blocks", {**ATTENTIONS, "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",)}),
    ),
    modules={
        **two_layers("adaln_single.emb.timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        **two_layers("adaln_single.emb.resolution_embedder", "csize_embedder.mlp.0", "csize_embedder.mlp.2"),
        **two_layers("adaln_single.emb.aspect_ratio_embedder", "ar_embedder.mlp.0", "ar_embedder.mlp.2"),
        **CAPTION, "x_embedder.proj": ("pos_embed.proj",), "t_block.1": ("adaln_single.linear",),
        "final_layer.linear": ("proj_out",),
    },
)  # fmt: skip
