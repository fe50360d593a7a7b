"""DINOv2 with register tokens (Darcet et al., 2024)."""

from __future__ import annotations

from ..._records.block_parts import Blocks
from ..vision_record import Head, VisionRecord
from .dinov2 import BLOCK, TINY

RECORD = VisionRecord(
    classes=("Dinov2WithRegistersModel",),
    modules=("embeddings", Blocks("encoder.layer", BLOCK), "layernorm"),
    heads={"Dinov2WithRegistersForImageClassification": Head("dinov2_with_registers")},
    tiny={"dinov2_registers": {**TINY, "num_register_tokens": 2}},
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
