"""Self-attention of timm, open_clip and transformers: its weights by the names of the libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def projections(attn: Any) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of queries, keys and values, and of the output layer, by the names of the libraries."""
    if isinstance(attn, nn.MultiheadAttention):
        fused, out = (attn.in_proj_weight, attn.in_proj_bias), attn.out_proj
    elif hasattr(attn, "qkv"):
        zeros = None if attn.qkv.bias is not None else torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        fused, out = (attn.qkv.weight, attn.qkv.bias if zeros is None else zeros), attn.proj
    else:
        layers, out = (attn.q_proj, attn.k_proj, attn.v_proj), getattr(attn, "o_proj", None) or attn.out_proj
        return [*((layer.weight, layer.bias) for layer in layers), (out.weight, out.bias)]
    return [*zip(*(t.chunk(3) for t in fused), strict=True), (out.weight, out.bias)]
