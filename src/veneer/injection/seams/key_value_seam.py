"""The seam of keys and values that are added to an attention module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import InputKeyValueAdapter, KeyValueAdapter
from ..attention_sites import SelfAttentionSite
from ..errors import HostChanged, StateError
from ..method import Adapter
from ..sites import WeightSite
from .adapter_calls import cast as to_adapter_dtype
from .adapter_calls import first_argument, is_tracing
from .seam import HookSeam


class KeyValueSeam(HookSeam):
    """softmax([q P_kᵀ / √d + log s, q Kᵀ / √d]) [P_v; V]: adds keys P_k and values P_v to an attention module at strength s.

    While the module runs, a torch function mode changes its first call of `F.scaled_dot_product_attention`: this is after
    projections, norms of keys and rotations, the same for every library, and also captured by `torch.compile` and exports. All
    queries attend to the added keys: masks and relative positions get zero columns for them. Strength s multiplies the
    unnormalized attention weights of the added keys, so that 0 is the host and none is negative. timm's `fused_attn` is
    True during the call. Keys and values are the same for all samples, or depend on the first argument of the module.
    """

    adapters: Sequence[KeyValueAdapter | InputKeyValueAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[WeightSite | SelfAttentionSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = attention_of(self.sites[0])
        self.__dict__.update(_modes=[], full=True, reads_input=isinstance(self.adapters[0], InputKeyValueAdapter))

    def hooks(self) -> list[RemovableHandle]:
        attn = self.owner()
        leave = attn.register_forward_hook(self._leave, prepend=True, always_call=True)  # modes are left in reverse order
        return [attn.register_forward_pre_hook(self._enter, with_kwargs=True), leave]

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

    def _enter(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_bypassed():
            return
        adapter = self.adapters[0]
        keys, values = self._keys_values(adapter, attn, args, kwargs)
        exact = not torch.compiler.is_compiling() and self.__dict__["full"] and not is_tracing()  # no guard on the strength
        mode = AddedKeys(keys, values, None if exact else adapter.strength)
        self.__dict__["_modes"].append((mode, getattr(attn, "fused_attn", True)))
        if hasattr(attn, "fused_attn"):
            attn.fused_attn = True
        mode.__enter__()

    def _keys_values(self, adapter: Any, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if not self.__dict__["reads_input"]:
            return cast(tuple[Tensor, Tensor], adapter.keys_values())
        x = first_argument(args, kwargs)
        if isinstance(attn, nn.MultiheadAttention) and not attn.batch_first:
            x = x.transpose(0, 1)
        return cast(tuple[Tensor, Tensor], adapter.keys_values_of(to_adapter_dtype(x, adapter)))

    def _leave(self, attn: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.__dict__["_modes"]:
            return
        mode, fused = self.__dict__["_modes"].pop()
        mode.__exit__(None, None, None)
        if hasattr(attn, "fused_attn"):
            attn.fused_attn = fused
        if not mode.calls and output is not None:
            site = self.sites[0].name
            message = (
                f"{site}: {type(attn).__name__} at '{self.home}' computed its attention without F.scaled_dot_product_attention, "
                "so that keys and values cannot be added. Choose this implementation, such as attn_implementation='sdpa'."
            )
            raise HostChanged(message, where=site, given=type(attn).__name__, expected="F.scaled_dot_product_attention")


def attention_of(site: WeightSite | SelfAttentionSite) -> str:
    """Path of the attention module of a site."""
    return site.path if isinstance(site, SelfAttentionSite) else site.attention


class AddedKeys(TorchFunctionMode):
    """Adds keys and values to the first scaled dot-product attention that is called inside it.

    Args:
        keys, values: ([batch,] heads, added tokens, channels). `strength`: buffer (), or None for 1.
    Attributes:
        calls: number of calls of attention so far.
    """

    def __init__(self, keys: Tensor, values: Tensor, strength: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.strength, self.calls = keys, values, strength, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if self.calls == 0 and func is F.scaled_dot_product_attention:
            self.calls = 1
            return self.attend(*args, **(kwargs or {}))
        if self.calls == 0 and func is F.multi_head_attention_forward:
            self.calls = 1
            return multi_head(self, *args, **(kwargs or {}))
        if func is Tensor.unflatten:  # written in Python, with a call of `super()` that torch.compile does not trace
            func = torch.unflatten
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` with the added keys and values."""
        added = self.keys.shape
        same_samples = len(added) == 3 or key.shape[:-3] == added[:-3]
        if key.shape[-3] != added[-3] or key.shape[-1] != added[-1] or value.shape[-1] != key.shape[-1] or not same_samples:
            message = (
                f"keys and values of attention have the shapes {tuple(key.shape)} and {tuple(value.shape)}, the added ones "
                f"{tuple(added)} ([batch,] heads, tokens, channels). Select other attention modules by where=…"
            )
            raise HostChanged(message, where="attention", given=tuple(key.shape), expected=tuple(self.keys.shape))
        mask = self._widen(attn_mask, is_causal, query, key.shape[-2])
        pairs = ((self.keys, key), (self.values, value))
        keys, values = (torch.cat([p.to(x.dtype).expand(*x.shape[:-3], -1, -1, -1), x], -2) for p, x in pairs)
        return F.scaled_dot_product_attention(query, keys, values, mask, dropout_p, False, **options)

    def _widen(self, mask: Tensor | None, causal: bool, query: Tensor, length: int) -> Tensor | None:
        """The mask with log s, which is 0 at strength 1, in front for the added keys. None if nothing is masked."""
        if mask is None and not causal and self.strength is None:
            return None
        if causal:
            mask = torch.ones(query.shape[-2], length, dtype=torch.bool, device=query.device).tril()
        if mask is None:
            mask = query.new_zeros(1, length)
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        mask = mask.expand(*mask.shape[:-1], length)
        score = query.new_zeros(()) if self.strength is None else self.strength.log().to(query.dtype)
        return torch.cat([score.to(mask.dtype).expand(*mask.shape[:-1], self.keys.shape[-2]), mask], -1)


def multi_head(
    mode: AddedKeys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """`F.multi_head_attention_forward` of (length, batch, width) with added keys and values, without attention weights.

    Raises:
        HostChanged: an argument that this form does not support.
    """
    rejected = {"need_weights": need_weights, "add_zero_attn": add_zero_attn, "bias_k": bias_k is not None}
    rejected |= {"key_padding_mask": key_padding_mask is not None, "static_k": options.get("static_k") is not None}
    if any(rejected.values()):
        names = tuple(name for name, is_set in rejected.items() if is_set)
        message = f"keys and values cannot be added to a MultiheadAttention that is called with {', '.join(names)}."
        raise HostChanged(message, where="MultiheadAttention", given=names, expected=())
    separate = (options.get("q_proj_weight"), options.get("k_proj_weight"), options.get("v_proj_weight"))
    weights = separate if in_proj_weight is None else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if in_proj_weight is not None and query is key and key is value:
        projected = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        inputs = zip((query, key, value), weights, biases, strict=True)
        projected = tuple(F.linear(x, cast(Tensor, w), b) for x, w, b in inputs)
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in projected)
    causal = bool(options.get("is_causal")) and attn_mask is None
    mask = attn_mask.view(-1, heads, *attn_mask.shape[-2:]) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
    output = mode.attend(q, k, v, mask, dropout_p if training else 0.0, causal)
    return F.linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None
