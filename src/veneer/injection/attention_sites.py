"""The site of a self-attention without a processor, whose layers an adapter may call."""

from __future__ import annotations

from dataclasses import dataclass

from .sites import Site, WeightSite


@dataclass(frozen=True, kw_only=True)
class SelfAttentionSite(Site):
    """A self-attention without a processor: softmax(q kᵀ / √d) v for each head, then one linear layer.

    Args:
        path: its module, which is called with tokens (batch, tokens, width) first and returns what the output layer computes,
            first if it returns a tuple. `width`: of the tokens. `heads`: number of heads.
        query, key, value, out: its layers, each a whole weight or rows of a fused one.
        query_norm, key_norm: paths of norms over the channels of one head, or "" for none.
        can_extend: True if tokens, keys and values may be added: `out.sdpa`, and nothing fixes the number of tokens.
    """

    path: str
    width: int
    heads: int
    query: WeightSite
    key: WeightSite
    value: WeightSite
    out: WeightSite
    query_norm: str = ""
    key_norm: str = ""
    can_extend: bool = False
