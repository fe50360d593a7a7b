"""The base of seams that change the scaled dot-product attention of a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..attention_sites import AttentionSite, SelfAttentionSite
from ..errors import HostChanged
from ..method import Adapter
from ..sites import WeightSite
from .adapter_calls import cast as to_adapter_dtype
from .adapter_calls import first_argument
from .attention_call import AttentionCall
from .seam import HookSeam

AttentionPart = WeightSite | SelfAttentionSite | AttentionSite


class AttentionCallSeam(HookSeam):
    """Changes the arguments of an attention module's first call of `F.scaled_dot_product_attention`.

    While the module runs, a torch function mode changes this call: it is after projections, norms of keys and rotations, the same
    for every library, and also captured by `torch.compile` and exports. timm's `fused_attn` is True during the call.
    """

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[AttentionPart, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = attention_of(self.sites[0])
        self.__dict__.update(_modes=[])

    def hooks(self) -> list[RemovableHandle]:
        attn = self.owner()
        leave = attn.register_forward_hook(self._leave, prepend=True, always_call=True)  # modes are left in reverse order
        return [attn.register_forward_pre_hook(self._enter, with_kwargs=True), leave]

    @abstractmethod
    def mode(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChangedAttention:
        """The mode of one forward pass of the module `attn` with these arguments."""

    def tokens(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The module's first argument, batch first, in the dtype of the adapter."""
        x = first_argument(args, kwargs)
        if isinstance(attn, nn.MultiheadAttention) and not attn.batch_first:
            x = x.transpose(0, 1)
        return to_adapter_dtype(x, self.adapters[0])

    def _enter(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_bypassed():
            return
        mode = self.mode(attn, args, kwargs)
        self.__dict__["_modes"].append((mode, getattr(attn, "fused_attn", True)))
        if hasattr(attn, "fused_attn"):
            attn.fused_attn = True
        mode.__enter__()

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
                "so that its keys cannot be changed. Choose this implementation: attn_implementation='sdpa' in transformers, "
                "AttnProcessor2_0 in diffusers."
            )
            raise HostChanged(message, where=site, given=type(attn).__name__, expected="F.scaled_dot_product_attention")


def attention_of(site: AttentionPart) -> str:
    """Path of the attention module of a site."""
    return site.attention if isinstance(site, WeightSite) else site.path


class ChangedAttention(TorchFunctionMode, ABC):
    """Calls `attend` instead of the first scaled dot-product attention that is called inside it.

    Attributes:
        calls: number of calls of attention so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if self.calls == 0 and func is F.scaled_dot_product_attention:
            self.calls = 1
            return self.attend(AttentionCall.of(*args, **(kwargs or {})))
        if self.calls == 0 and func is F.multi_head_attention_forward:
            self.calls = 1
            return multi_head(self, *args, **(kwargs or {}))
        if func is Tensor.unflatten:  # written in Python, with a call of `super()` that torch.compile does not trace
            func = torch.unflatten
        return func(*args, **(kwargs or {}))

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """What the output of the call is replaced by."""


def multi_head(
    mode: ChangedAttention,
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
    """`F.multi_head_attention_forward` of (length, batch, width) with the mode's attention, without attention weights.

    Raises:
        HostChanged: an argument that this form does not support.
    """
    rejected = {"need_weights": need_weights, "add_zero_attn": add_zero_attn, "bias_k": bias_k is not None}
    rejected |= {"key_padding_mask": key_padding_mask is not None, "static_k": options.get("static_k") is not None}
    if any(rejected.values()):
        names = tuple(name for name, is_set in rejected.items() if is_set)
        message = f"keys cannot be changed in a MultiheadAttention that is called with {', '.join(names)}."
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
    output = mode.attend(AttentionCall(q, k, v, mask, causal, dropout=dropout_p if training else 0.0))
    return F.linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None
