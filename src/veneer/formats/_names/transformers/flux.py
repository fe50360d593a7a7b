"""FLUX.1. Source: black-forest-labs/flux `model.py`, `modules/layers.py`; diffusers `loaders/single_file_utils.py`."""

from __future__ import annotations

from .record import ADDED, QKV, BlockNames, Paths, TransformerNames, two_layers

DOUBLE: Paths = {
    "img_attn.qkv": QKV, "img_attn.proj": ("attn.to_out.0",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",), "txt_attn.qkv": ADDED, "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
SINGLE: Paths = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
BLOCKS = (
    BlockNames("transformer_blocks", "double_blocks", DOUBLE),
    BlockNames("single_transformer_blocks", "single_blocks", SINGLE),
)
EMBEDDERS: Paths = {
    **two_layers("time_text_embed.timestep_embedder", "time_in.in_layer", "time_in.out_layer"),
    **two_layers("time_text_embed.text_embedder", "vector_in.in_layer", "vector_in.out_layer"),
    **two_layers("time_text_embed.guidance_embedder", "guidance_in.in_layer", "guidance_in.out_layer"),
}
MODULATION = "final_layer.adaLN_modulation.1"
RECORD = TransformerNames(
    classes=("FluxTransformer2DModel",),
    blocks=BLOCKS,
    modules={
        **EMBEDDERS, "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
        MODULATION: ("norm_out.linear",),
    },
    swapped=(MODULATION,),
    network_module="networks.lora_flux",
    version="flux1",
    model_spec=lambda config: "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell",
)  # fmt: skip
