"""Krea 2: gated attention and feed-forwards, and the fusion of the text model's layers.

Source: krea-ai/krea-2 `mmdit.py`, whose names ComfyUI, musubi-tuner `networks/lora_krea2.py` and ai-toolkit have; diffusers
`loaders/single_file_utils.py`, `loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

from .record import BlockNames, Paths, TransformerNames, two_layers

BLOCK: Paths = {
    "attn.wq": ("attn.to_q",), "attn.wk": ("attn.to_k",), "attn.wv": ("attn.to_v",), "attn.gate": ("attn.to_gate",),
    "attn.wo": ("attn.to_out.0",), "mlp.gate": ("ff.gate",), "mlp.up": ("ff.up",), "mlp.down": ("ff.down",),
}  # fmt: skip
FUSION = ("layerwise_blocks", "refiner_blocks")
RECORD = TransformerNames(
    classes=("Krea2Transformer2DModel",),
    blocks=(
        BlockNames("transformer_blocks", "blocks", BLOCK),
        *(BlockNames(f"text_fusion.{name}", f"txtfusion.{name}", BLOCK) for name in FUSION),
    ),
    modules={
        **two_layers("time_embed", "tmlp.0", "tmlp.2"), **two_layers("txt_in", "txtmlp.1", "txtmlp.3"),
        "tproj.1": ("time_mod_proj",), "txtfusion.projector": ("text_fusion.projector",), "first": ("img_in",),
        "last.linear": ("final_layer.linear",),
    },
    network_module="networks.lora_krea2",
    model_spec=lambda config: "Krea-2",
)  # fmt: skip
