"""Wan 2.1 and 2.2. Source: Wan-Video/Wan2.1 `wan/modules/model.py`; diffusers `loaders/lora_conversion_utils.py`."""

from __future__ import annotations

from .record import BlockNames, TransformerNames, two_layers

LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
RECORD = TransformerNames(
    classes=("WanTransformer3DModel",),
    blocks=(
        BlockNames(
            "blocks",
            "blocks",
            {
                **{f"self_attn.{name}": (f"attn1.{own}",) for name, own in LAYERS.items()},
                **{f"cross_attn.{name}": (f"attn2.{own}",) for name, own in LAYERS.items()},
                "cross_attn.k_img": ("attn2.add_k_proj",), "cross_attn.v_img": ("attn2.add_v_proj",),
                "ffn.0": ("ffn.net.0.proj",), "ffn.2": ("ffn.net.2",),
            },
        ),
    ),
    modules={
        **two_layers("condition_embedder.time_embedder", "time_embedding.0", "time_embedding.2"),
        **two_layers("condition_embedder.text_embedder", "text_embedding.0", "text_embedding.2"),
        "time_projection.1": ("condition_embedder.time_proj",),
        "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
        "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
        "patch_embedding": ("patch_embedding",), "head.head": ("proj_out",),
    },
    network_module="networks.lora_wan",
    model_spec=lambda config: "wan2.1",
)  # fmt: skip
