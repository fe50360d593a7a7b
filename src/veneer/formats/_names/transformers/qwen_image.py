"""Qwen-Image: the same names in diffusers, ComfyUI and musubi-tuner. Source: ComfyUI `comfy/ldm/qwen_image/model.py`."""

from __future__ import annotations

from .record import ADDED, QKV, BlockNames, TransformerNames, same

STREAMS = tuple(f"{stream}_{name}" for stream in ("img", "txt") for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2"))
EMBEDDER = "time_text_embed.timestep_embedder"
RECORD = TransformerNames(
    classes=("QwenImageTransformer2DModel",),
    blocks=(
        BlockNames("transformer_blocks", "transformer_blocks", same(*QKV, *ADDED, "attn.to_out.0", "attn.to_add_out", *STREAMS)),
    ),
    modules=same("img_in", "txt_in", f"{EMBEDDER}.linear_1", f"{EMBEDDER}.linear_2", "norm_out.linear", "proj_out"),
    network_module="networks.lora_qwen_image",
    model_spec=lambda config: "Qwen-Image",
)
