"""Z-Image. ComfyUI has the fused names of Lumina-Image 2; the original release has those of diffusers.

Source: ComfyUI `comfy/utils.py`; Tongyi-MAI/Z-Image; kohya-ss/musubi-tuner `networks/convert_z_image_lora_to_comfy.py`; diffusers
`loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

from .lumina2 import LISTS
from .record import BlockNames, Paths, TransformerNames, same

BLOCK: Paths = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.out": ("attention.to_out.0",),
    **same("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
}  # fmt: skip
RECORD = TransformerNames(
    classes=("ZImageTransformer2DModel",),
    blocks=tuple(BlockNames(name, name, BLOCK) for name in LISTS),
    modules={
        **same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"), "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    },
    network_module="networks.lora_zimage",
    model_spec=lambda config: "Z-Image",
)  # fmt: skip
