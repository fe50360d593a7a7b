"""CLIP's image tower (Radford et al., 2021)."""

from __future__ import annotations

from ..._records.block_parts import Blocks
from ..vision_record import Head, VisionRecord
from .siglip import BLOCK, TINY

RECORD = VisionRecord(
    classes=("CLIPVisionModel",),
    modules=("embeddings", "pre_layrnorm", Blocks("encoder.layers", BLOCK), "post_layernorm"),
    heads={"CLIPForImageClassification": Head("vision_model", unused=("post_layernorm",))},
    with_text=("CLIPModel",),
    tiny={"clip": TINY},
    full_size={"openai/clip-vit-base-patch32": ({}, 87_456_000)},
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
