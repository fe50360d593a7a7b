"""HunyuanVideo: FLUX.1's names and a refiner of the text, in the spelling of ComfyUI; the original release's is read too.

Source: Tencent/HunyuanVideo `hyvideo/modules/models.py`; ComfyUI `comfy/supported_models.py`, `comfy/lora.py`; diffusers
`loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

from .flux import BLOCKS, EMBEDDERS, MODULATION
from .record import QKV, BlockNames, Paths, TransformerNames, two_layers

REFINER: Paths = {
    "self_attn.qkv": QKV, "self_attn.proj": ("attn.to_out.0",), "mlp.0": ("ff.net.0.proj",), "mlp.2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}  # fmt: skip
ORIGINAL = {
    "_attn.": "_attn_", "_mod.lin": "_mod.linear", "modulation.lin": "modulation.linear", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
    "time_in.in_layer": "time_in.mlp.0", "time_in.out_layer": "time_in.mlp.2", "guidance_in.in_layer": "guidance_in.mlp.0",
    "guidance_in.out_layer": "guidance_in.mlp.2", "t_embedder.in_layer": "t_embedder.mlp.0",
    "t_embedder.out_layer": "t_embedder.mlp.2", "c_embedder.in_layer": "c_embedder.linear_1",
    "c_embedder.out_layer": "c_embedder.linear_2",
}  # fmt: skip
TEXT = "context_embedder.time_text_embed"
RECORD = TransformerNames(
    classes=("HunyuanVideoTransformer3DModel",),
    blocks=(
        *BLOCKS,
        BlockNames("context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks", REFINER),
    ),
    modules={
        **EMBEDDERS,
        **two_layers(f"{TEXT}.timestep_embedder", "txt_in.t_embedder.in_layer", "txt_in.t_embedder.out_layer"),
        **two_layers(f"{TEXT}.text_embedder", "txt_in.c_embedder.in_layer", "txt_in.c_embedder.out_layer"),
        "txt_in.input_embedder": ("context_embedder.proj_in",), "img_in.proj": ("x_embedder.proj",),
        "final_layer.linear": ("proj_out",), MODULATION: ("norm_out.linear",),
    },
    swapped=(MODULATION,),
    spellings=(ORIGINAL,),
    prefixes=("diffusion_model", "transformer"),
    network_module="networks.lora",
    model_spec=lambda config: "hunyuan-video",
)  # fmt: skip
