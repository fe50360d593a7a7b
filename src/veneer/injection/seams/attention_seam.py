"""The seam of attention processors, which it wraps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_forms import AttentionAdapter
from ..method import Adapter
from .seam import Seam


class ProcessorSeam(Seam):
    """Wraps the current attention processor, and restores it on detach.

    The adapter's `attend(inner, attn, hidden_states, **kwargs)` calls `inner`, the wrapped processor, as often as it needs. With
    `applies_strength = False` the wrapped processor runs once more for the blend.
    """

    adapters: Sequence[AttentionAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.path = parts[0][0].path

    def forward(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention with the adapter. The host calls this instead of its processor."""
        inner = self.__dict__["_inner"]
        if self.is_bypassed():
            return inner(attn, hidden_states, *args, **kwargs)
        adapter = self.adapters[0]
        after = adapter.attend(inner, attn, hidden_states, *args, **kwargs)
        if adapter.applies_strength:
            return after
        before = inner(attn, hidden_states, *args, **kwargs)
        if isinstance(before, tuple):
            return tuple(torch.lerp(b, a, adapter.strength.to(b.dtype)) for b, a in zip(before, after, strict=True))
        return torch.lerp(before, after.to(before.dtype), adapter.strength.to(before.dtype))

    def join(self, name: str) -> None:
        attn: Any = self.module(self.path)
        self.__dict__.update(_inner=attn.processor, _attn=attn, joined=True)
        self._set_processor(attn, self.train(attn.training))

    def uninstall(self) -> None:
        if not self.__dict__["joined"]:
            return
        attn, inner = self.__dict__["_attn"], self.__dict__["_inner"]
        outer = attn.processor
        while outer is not self and isinstance(outer, ProcessorSeam) and outer.__dict__["_inner"] is not self:
            outer = outer.__dict__["_inner"]
        if outer is self:
            self._set_processor(attn, inner)
        elif isinstance(outer, ProcessorSeam):
            outer.__dict__["_inner"] = inner
        self.__dict__["joined"] = False

    @staticmethod
    def _set_processor(attn: nn.Module, processor: Any) -> None:
        attn._modules.pop("processor", None)
        attn.__dict__.pop("processor", None)
        if isinstance(processor, nn.Module):
            attn._modules["processor"] = processor
        else:
            attn.__dict__["processor"] = processor

    def is_intact(self) -> bool:
        outer = getattr(self.module(self.path), "processor", None)
        while isinstance(outer, ProcessorSeam):
            if outer is self:
                return True
            outer = outer.__dict__["_inner"]
        return False
