"""A call of scaled dot-product attention: its mask, its scores, its map and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION: Callable[..., Tensor] = F.scaled_dot_product_attention


@dataclass(frozen=True)
class AttentionCall:
    """softmax(q kᵀ·scale + mask) v, for each head.

    Args:
        query: (batch, heads, tokens, channels). `key`, `value`: (batch, heads or groups of heads, other tokens, channels).
        mask: added to the scores, or boolean, False for tokens that are not read; None for none.
        causal: True if a token reads itself and earlier ones only. `scale`: of the scores, or None for 1 / √channels.
        dropout: probability with which weights are dropped.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionCall:
        """The call with the arguments of `F.scaled_dot_product_attention`."""
        return cls(query, key, value, attn_mask, is_causal, scale, dropout_p)

    def output(self, attention: Callable[..., Tensor] = ATTENTION) -> Tensor:
        """(batch, heads, tokens, channels). `attention`: the function that computes it."""
        grouped = self.query.shape[-3] != self.key.shape[-3]
        arguments = (self.query, self.key, self.value, self.mask, self.dropout, self.causal)
        return attention(*arguments, scale=self.scale, enable_gqa=grouped)

    def additive_mask(self) -> Tensor:
        """The mask as a float mask, which is added to the scores, (…, tokens or 1, other tokens)."""
        length, mask = self.key.shape[-2], self.mask
        if self.causal:
            mask = torch.ones(self.query.shape[-2], length, dtype=torch.bool, device=self.query.device).tril()
        if mask is None:
            mask = self.query.new_zeros(1, length)
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=self.query.dtype).masked_fill(~mask, float("-inf"))
        return mask.expand(*mask.shape[:-1], length)

    def scores(self) -> Tensor:
        """q kᵀ·scale + mask (batch, heads, tokens, other tokens), in single precision or more."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        key = self.key.repeat_interleave(self.query.shape[-3] // self.key.shape[-3], -3)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(self.query.device.type, enabled=False):
            return self.query.to(dtype) @ key.to(dtype).mT * scale + self.additive_mask()

    def map(self) -> Tensor:
        """The attention map (batch, heads, tokens, other tokens), in single precision; its rows sum to 1."""
        return self.scores().float().softmax(-1)

    def uniform(self) -> AttentionCall:
        """The same call with equal attention to all tokens that may be read, so that a map has 1 / number of tokens."""
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = torch.where(mask == float("-inf"), mask, torch.zeros_like(mask))
        return replace(self, query=torch.zeros_like(self.query), mask=mask)
