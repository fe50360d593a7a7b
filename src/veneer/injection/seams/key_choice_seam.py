"""The seam of attention that reads a choice of its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapter_forms import KeyChoiceAdapter
from ..errors import HostChanged, StateError
from .attention_call import AttentionCall
from .attention_call_seam import AttentionCallSeam, ChangedAttention


class KeyChoiceSeam(AttentionCallSeam):
    """softmax(q Kᵀ / √d + log(1 − s·[not chosen])) V: each query reads the keys that an adapter chooses, at strength s.

    The strength takes that share of the unnormalized attention weights of the other keys, so that 0 is the host.
    """

    adapters: Sequence[KeyChoiceAdapter]

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength outside 0 to 1, for which weights would be negative or larger than the host's."""
        if not 0 <= strength <= 1:
            site = self.sites[0].name
            message = f"{site}: the strength is the share that is left out of attention weights, so in [0, 1], got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def mode(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChosenKeys:
        """Leaves out the keys that the adapter does not choose."""
        return ChosenKeys(self.adapters[0], self.tokens(attn, args, kwargs))


class ChosenKeys(ChangedAttention):
    """Leaves out keys of the first scaled dot-product attention that is called inside it.

    Args:
        adapter: chooses the keys. `x`: what the attention module reads, (batch, tokens, width).
    """

    def __init__(self, adapter: KeyChoiceAdapter, x: Tensor) -> None:
        super().__init__()
        self.adapter, self.x = adapter, x

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention to the chosen keys."""
        batch, tokens = self.x.shape[:2]  # not by `len`, which would fix the batch size in an export
        expected = (batch, tokens, tokens)
        if (got := (call.query.shape[0], call.query.shape[-2], call.key.shape[-2])) != expected:
            message = (
                f"attention has {got[1]} queries and {got[2]} keys in a batch of {got[0]}, and its module reads tokens "
                f"{tuple(self.x.shape)}: keys are chosen only where both are these tokens. Attach methods that add keys before "
                "this one, or select other modules by where=…"
            )
            raise HostChanged(message, where="attention", given=got, expected=expected)
        mask = call.additive_mask()
        chosen = self.adapter.choose(self.x, mask, torch.no_grad()(call.scores))
        share = torch.log1p(-self.adapter.strength).to(call.query.dtype)
        mask = mask + torch.where(chosen, share.new_zeros(()), share)
        return replace(call, mask=mask, causal=False).output(F.scaled_dot_product_attention)
