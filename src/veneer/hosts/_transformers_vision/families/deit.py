"""DeiT: ViT with a distillation token (Touvron et al., 2021)."""

from __future__ import annotations

from ..._records.block_parts import Blocks
from ..vision_record import Head, VisionRecord
from .vit import BLOCK, TINY

RECORD = VisionRecord(
    classes=("DeiTModel",),
    modules=("embeddings", Blocks("layers", BLOCK), "layernorm", "pooler"),
    heads={"DeiTForImageClassification": Head("deit")},
    options={"add_pooling_layer": False},
    tiny={"deit": TINY},
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
