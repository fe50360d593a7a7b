"""The seam of keys and values that are added to an attention module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter_forms import InputKeyValueAdapter, KeyValueAdapter
from ..attention_sites import SelfAttentionSite
from ..errors import HostChanged, StateError
from ..method import Adapter
from ..sites import WeightSite
from .adapter_calls import is_tracing
from .attention_call import AttentionCall
from .attention_call_seam import AttentionCallSeam, ChangedAttention


class KeyValueSeam(AttentionCallSeam):
    """softmax([q P_kᵀ / √d + log s, q Kᵀ / √d]) [P_v; V]: adds keys P_k and values P_v to an attention module at strength s.

    All queries attend to the added keys: masks and relative positions get zero columns for them. Strength s multiplies the
    unnormalized attention weights of the added keys, so that 0 is the host and none is negative. Keys and values are the same for
    all samples, or depend on the first argument of the module.
    """

    adapters: Sequence[KeyValueAdapter | InputKeyValueAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[WeightSite | SelfAttentionSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.__dict__.update(full=True, reads_input=isinstance(self.adapters[0], InputKeyValueAdapter))

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a negative strength, which has no logarithm."""
        if not strength >= 0:
            site = self.sites[0].name
            message = f"{site}: added keys multiply attention weights, so the strength must be at least 0, got {strength}."
            raise StateError(message, where=site, given=strength, expected=0)

    def write_strength(self, strength: float) -> None:
        """Writes the strength; at 1 no mask is needed."""
        super().write_strength(strength)
        self.__dict__["full"] = strength == 1

    def mode(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AddedKeys:
        """Adds the keys and values of the adapter."""
        adapter: Any = self.adapters[0]
        made = adapter.keys_values_of(self.tokens(attn, args, kwargs)) if self.__dict__["reads_input"] else adapter.keys_values()
        keys, values = cast(tuple[Tensor, Tensor], made)
        exact = not torch.compiler.is_compiling() and self.__dict__["full"] and not is_tracing()  # no guard on the strength
        return AddedKeys(keys, values, None if exact else adapter.strength)


class AddedKeys(ChangedAttention):
    """Adds keys and values to the first scaled dot-product attention that is called inside it.

    Args:
        keys, values: ([batch,] heads, added tokens, channels). `strength`: buffer (), or None for 1.
    """

    def __init__(self, keys: Tensor, values: Tensor, strength: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.strength = keys, values, strength

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention to the added keys and values, too."""
        added, key, value = self.keys.shape, call.key, call.value
        same_samples = len(added) == 3 or key.shape[:-3] == added[:-3]
        if key.shape[-3] != added[-3] or key.shape[-1] != added[-1] or value.shape[-1] != key.shape[-1] or not same_samples:
            message = (
                f"keys and values of attention have the shapes {tuple(key.shape)} and {tuple(value.shape)}, the added ones "
                f"{tuple(added)} ([batch,] heads, tokens, channels). Select other attention modules by where=…"
            )
            raise HostChanged(message, where="attention", given=tuple(key.shape), expected=tuple(self.keys.shape))
        pairs = ((self.keys, key), (self.values, value))
        keys, values = (torch.cat([p.to(x.dtype).expand(*x.shape[:-3], -1, -1, -1), x], -2) for p, x in pairs)
        changed = replace(call, key=keys, value=values, mask=self._widened_mask(call), causal=False)
        return changed.output(F.scaled_dot_product_attention)

    def _widened_mask(self, call: AttentionCall) -> Tensor | None:
        """The mask with log s, which is 0 at strength 1, in front for the added keys. None if nothing is masked."""
        if call.mask is None and not call.causal and self.strength is None:
            return None
        mask = call.additive_mask()
        score = mask.new_zeros(()) if self.strength is None else self.strength.log().to(call.query.dtype)
        return torch.cat([score.to(mask.dtype).expand(*mask.shape[:-1], self.keys.shape[-2]), mask], -1)
