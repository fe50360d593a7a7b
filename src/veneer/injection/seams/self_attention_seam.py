"""The seam of a self-attention without a processor: a hook on its module, which may call its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import AttentionAdapter
from ..attention_sites import SelfAttentionSite
from ..method import Adapter
from ..sites import WeightSite
from .adapter_calls import first_argument, main_output, module_at
from .seam import HookSeam

Layer = Callable[[Tensor], Tensor]


class AttentionLayers:
    """The layers of a self-attention by the names that they have in diffusers' `Attention`, with all adapters on them.

    Attributes:
        to_q, to_k, to_v: (…, width) to (…, channels of all heads). `to_out`: the output layer, in a list.
        norm_q, norm_k: norms of each head's channels, for tensors with the channels of all heads; None for none.
        heads: number of heads. `rescale_output_factor`: 1.
    """

    rescale_output_factor = 1.0

    def __init__(self, tower: nn.Module, site: SelfAttentionSite) -> None:
        self.tower, self.heads = tower, site.heads
        self.to_q, self.to_k, self.to_v = (self._layer(part) for part in (site.query, site.key, site.value))
        self.to_out = [self._layer(site.out)]
        self.norm_q, self.norm_k = self._norm(site.query_norm), self._norm(site.key_norm)

    def _layer(self, site: WeightSite) -> Layer:
        return lambda x: apply_layer(self.tower, site, x)

    def _norm(self, path: str) -> Layer | None:
        if not path:
            return None
        norm, heads = module_at(self.tower, path), self.heads
        return lambda x: norm(x.unflatten(-1, (heads, -1))).flatten(-2)


def apply_layer(tower: nn.Module, site: WeightSite, x: Tensor) -> Tensor:
    """The output of a linear layer, or of rows of it, with the hooks and parametrizations of its module.

    Args:
        site: the layer. `x`: (…, d_in).
    Returns:
        (…, d_out).
    """
    module: Any = module_at(tower, site.path)
    rows = ... if site.rows is None else slice(*site.rows)
    is_hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    if not site.called or (site.rows is not None and not is_hooked and type(module) is nn.Linear):
        return F.linear(x, getattr(module, site.param)[rows], _bias(tower, site))
    output: Tensor = module(x)[..., rows]
    is_separate = site.bias and site.bias.rpartition(".")[0] != site.path
    return output + _bias(tower, site) if is_separate else output


def _bias(tower: nn.Module, site: WeightSite) -> Any:
    """The bias that follows a layer, or the rows of it, or None."""
    if not site.bias:
        return None
    owner, _, name = site.bias.rpartition(".")
    return getattr(module_at(tower, owner), name)[... if site.bias_rows is None else slice(*site.bias_rows)]


class SelfAttentionSeam(HookSeam):
    """A hook on the module of a `SelfAttentionSite`, for adapters with the form `attend`.

    `inner` returns what the module has computed, and `attn` is an `AttentionLayers`.
    """

    adapters: Sequence[AttentionAdapter]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[SelfAttentionSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.home = self.sites[0].path

    def hooks(self) -> list[RemovableHandle]:
        return [self.module(self.home).register_forward_hook(self._write, with_kwargs=True)]

    def _write(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.is_bypassed():
            return None
        adapter, before = self.adapters[0], main_output(output)
        layers = AttentionLayers(self.__dict__["tower"], self.sites[0])
        after: Tensor = adapter.attend(lambda *_, **__: before, layers, first_argument(args, kwargs)).to(before.dtype)
        if not adapter.applies_strength:
            after = torch.lerp(before, after, adapter.strength.to(before.dtype))
        return (after, *output[1:]) if isinstance(output, tuple) else after
