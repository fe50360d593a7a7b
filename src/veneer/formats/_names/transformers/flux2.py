"""FLUX.2. Source: diffusers `loaders/single_file_utils.py`, `loaders/lora_conversion_utils.py`; black-forest-labs/flux2.

diffusers' converter of LoRA leaves the halves of `final_layer.adaLN_modulation.1` unswapped, its converter of weights swaps them.
"""

from __future__ import annotations

from .flux import MODULATION
from .record import ADDED, QKV, BlockNames, TransformerNames, two_layers

MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
VERSIONS = {48: "Flux.2-dev", 24: "Flux.2-klein-4b", 32: "Flux.2-klein-9b"}  # by number of heads
RECORD = TransformerNames(
    classes=("Flux2Transformer2DModel",),
    blocks=(
        BlockNames(
            "transformer_blocks",
            "double_blocks",
            {
                "img_attn.qkv": QKV, "img_attn.proj": ("attn.to_out.0",), "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",), "txt_attn.qkv": ADDED, "txt_attn.proj": ("attn.to_add_out",),
                "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        BlockNames(
            "single_transformer_blocks",
            "single_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    ),
    modules={
        **two_layers("time_guidance_embed.timestep_embedder", "time_in.in_layer", "time_in.out_layer"),
        **two_layers("time_guidance_embed.guidance_embedder", "guidance_in.in_layer", "guidance_in.out_layer"),
        **{f"{name}.lin": (f"{name}.linear",) for name in MODULATIONS},
        "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
        MODULATION: ("norm_out.linear",),
    },
    swapped=(MODULATION,),
    network_module="networks.lora_flux_2",
    model_spec=lambda config: VERSIONS.get(config.get("num_attention_heads", 0)),
)  # fmt: skip
