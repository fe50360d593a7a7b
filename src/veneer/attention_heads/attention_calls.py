"""Calls of scaled dot-product attention: what enters them, their maps, and a way to change their output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import AttentionLayer, HeadsError

ATTENTION = F.scaled_dot_product_attention


@dataclass(frozen=True)
class AttentionCall:
    """softmax(q kᵀ·scale + mask) v, for each head.

    Args:
        query: (batch, heads, tokens, channels). `key`, `value`: (batch, heads or groups of heads, other tokens, channels).
        mask: added to the scores, or boolean, False for tokens that are not read; None for none.
        causal: True if a token reads itself and earlier ones only. `scale`: of the scores, or None for 1 / √channels.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None

    def output(self) -> Tensor:
        """(batch, heads, tokens, channels), without dropout."""
        grouped = self.query.shape[-3] != self.key.shape[-3]
        options: dict[str, Any] = {"is_causal": self.causal, "scale": self.scale, "enable_gqa": grouped}
        return ATTENTION(self.query, self.key, self.value, self.mask, **options)

    def map(self) -> Tensor:
        """The attention map (batch, heads, tokens, other tokens), in single precision; its rows sum to 1."""
        groups = self.query.shape[-3] // self.key.shape[-3]
        key = self.key.repeat_interleave(groups, -3).float()
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = self.query.float() @ key.mT * scale
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        if self.mask is not None:
            read = self.mask.dtype == torch.bool
            scores = scores.masked_fill(~self.mask, float("-inf")) if read else scores + self.mask.float()
        return scores.softmax(-1)

    def uniform(self) -> AttentionCall:
        """The same call with equal attention to all tokens that may be read, so that a map has 1 / number of tokens."""
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = torch.where(mask == float("-inf"), mask, torch.zeros_like(mask))
        return replace(self, query=torch.zeros_like(self.query), mask=mask)


def _call(
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
    return AttentionCall(query, key, value, attn_mask, is_causal, scale)


Visit = Callable[[AttentionLayer, AttentionCall], Tensor]
"""What is called instead of attention: layer and call to the output."""


@contextlib.contextmanager
def visit_attention(layers: Sequence[AttentionLayer], visit: Visit) -> Iterator[None]:
    """Calls `visit` for every scaled dot-product attention within the modules of the layers, and uses its output instead.

    Dropout of attention is left out. Works with every model that calls `F.scaled_dot_product_attention`, for which this context
    exchanges that function, so it must not be entered in several threads at once.

    Raises:
        HeadsError: at the end, a layer was called and computed its attention in another way, so that `visit` has not seen it.
    """
    visitor = _Visitor(visit)
    handles = [handle for layer in layers for handle in visitor.watch(layer)]
    unfused = [module for layer in layers if getattr(module := layer.module, "fused_attn", True) is False]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel of nn.MultiheadAttention shows no attention
    F.scaled_dot_product_attention = visitor.call
    for module in unfused:  # timm's option, off for Swin by default
        module.fused_attn = True  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ATTENTION
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for module in unfused:
            module.fused_attn = False  # type: ignore[assignment]
    if unseen := sorted(visitor.entered - visitor.seen):
        message = (
            f"{unseen[0]} computes its attention without F.scaled_dot_product_attention, so its heads cannot be studied. Choose "
            "this implementation, such as attn_implementation='sdpa' for transformers, or another model."
        )
        raise HeadsError(message, where=unseen[0], given=tuple(unseen), expected="F.scaled_dot_product_attention")


class _Visitor:
    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self.stack: list[AttentionLayer] = []
        self.entered: set[str] = set()
        self.seen: set[str] = set()

    def watch(self, layer: AttentionLayer) -> Iterator[Any]:
        """Hooks that record which layer is running."""

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(layer)
            self.entered.add(layer.name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        yield layer.module.register_forward_pre_hook(enter)
        yield layer.module.register_forward_hook(leave, always_call=True)

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes the place of `F.scaled_dot_product_attention`."""
        if not self.stack:
            return ATTENTION(*args, **kwargs)
        self.seen.add(self.stack[-1].name)
        return self.visit(self.stack[-1], _call(*args, **kwargs))
