"""BEiT: ViT with layer scales and relative positions, which fix the number of tokens (Bao et al., 2022).

A branch is written before its layer scale, which is a parameter of the block.
"""

from __future__ import annotations

from typing import Any

from ..._records.block_parts import Blocks, FeedForward
from ..vision_parts import MLP, Parameters, SelfAttention, Tokens
from ..vision_record import Head, VisionRecord
from .vit import TINY


def _is_absolute(config: Any) -> bool:
    return not (config.use_relative_position_bias or config.use_shared_relative_position_bias)


BLOCK = (
    Parameters("relative_position_bias", "embed.position"),
    SelfAttention("attention", norm="layernorm_before", scale="lambda_1"),
    FeedForward("mlp", norm="layernorm_after", layers=MLP, plain_norm=True, scale="lambda_2"),
    Tokens("layernorm_before"),
)
RECORD = VisionRecord(
    classes=("BeitModel",),
    modules=("embeddings", "shared_position_bias", Blocks("layers", BLOCK), "layernorm", "pooler"),
    heads={"BeitForImageClassification": Head("beit")},
    can_insert=_is_absolute,
    tiny={"beit": {**TINY, "use_relative_position_bias": True, "use_mask_token": True}},
)
