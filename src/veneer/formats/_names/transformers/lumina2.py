"""Lumina-Image 2. Its values and keys have fewer heads than its queries, so the parts of `attention.qkv` differ in size.

Source: Alpha-VLLM/Lumina-Image-2.0 `models/model.py`; diffusers `loaders/single_file_utils.py`; kohya-ss/sd-scripts
`networks/lora_lumina.py`.
"""

from __future__ import annotations

from .record import QKV, BlockNames, Paths, TransformerNames, two_layers

BLOCK: Paths = {
    "attention.qkv": QKV, "attention.out": ("attn.to_out.0",), "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",), "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}  # fmt: skip
LISTS = ("noise_refiner", "context_refiner", "layers")
RECORD = TransformerNames(
    classes=("Lumina2Transformer2DModel",),
    blocks=tuple(BlockNames(name, name, BLOCK) for name in LISTS),
    modules={
        **two_layers("time_caption_embed.timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        "cap_embedder.1": ("time_caption_embed.caption_embedder.1",), "x_embedder": ("x_embedder",),
        "final_layer.linear": ("norm_out.linear_2",), "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    },
    network_module="networks.lora_lumina",
    model_spec=lambda config: "lumina-2",
)  # fmt: skip
