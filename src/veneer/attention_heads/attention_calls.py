"""A way to read and change the calls of scaled dot-product attention of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.injection.seams.attention_call import ATTENTION, AttentionCall

from .layers import AttentionLayer, HeadsError

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
        return self.visit(self.stack[-1], replace(AttentionCall.of(*args, **kwargs), dropout=0.0))
