"""Stable Diffusion 3. The last block's text stream ends in a norm with swapped halves, as in the model.

Source: Stability-AI/sd3.5 `mmditx.py`; diffusers `loaders/single_file_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .flux import MODULATION
from .record import ADDED, QKV, BlockNames, Paths, TransformerNames, two_layers

CONTEXT = "context_block.adaLN_modulation.1"
JOINT: Paths = {
    "x_block.attn.qkv": QKV, "x_block.attn.proj": ("attn.to_out.0",), "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.qkv": ADDED, "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
    CONTEXT: ("norm1_context.linear",),
}  # fmt: skip


def _model_spec(config: Mapping[str, Any]) -> str:
    if config.get("dual_attention_layers"):
        return "stable-diffusion-3-5-medium"
    return "stable-diffusion-3-5-large" if config.get("num_layers") == 38 else "stable-diffusion-3-m"


RECORD = TransformerNames(
    classes=("SD3Transformer2DModel",),
    blocks=(BlockNames("transformer_blocks", "joint_blocks", JOINT, swapped_last=(CONTEXT,)),),
    modules={
        **two_layers("time_text_embed.timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        **two_layers("time_text_embed.text_embedder", "y_embedder.mlp.0", "y_embedder.mlp.2"),
        "x_embedder.proj": ("pos_embed.proj",), "context_embedder": ("context_embedder",), "final_layer.linear": ("proj_out",),
        MODULATION: ("norm_out.linear",),
    },
    swapped=(MODULATION,),
    network_module="networks.lora",
    model_spec=_model_spec,
)  # fmt: skip
