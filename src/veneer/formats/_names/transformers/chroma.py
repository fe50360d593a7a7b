"""Chroma: FLUX.1 without modulation layers. Source: diffusers `loaders/single_file_utils.py`; ComfyUI `comfy/ldm/chroma`."""

from __future__ import annotations

from .flux import BLOCKS
from .record import BlockNames, TransformerNames, same

APPROXIMATOR = "distilled_guidance_layer"
RECORD = TransformerNames(
    classes=("ChromaTransformer2DModel",),
    blocks=(
        *BLOCKS,
        BlockNames(f"{APPROXIMATOR}.layers", f"{APPROXIMATOR}.layers", {"in_layer": ("linear_1",), "out_layer": ("linear_2",)}),
    ),
    modules={
        **same(f"{APPROXIMATOR}.in_proj", f"{APPROXIMATOR}.out_proj"), "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
    },
    network_module="networks.lora_flux",
    model_spec=lambda config: "chroma",
)  # fmt: skip
