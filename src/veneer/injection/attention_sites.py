"""The sites of attention modules, with and without a processor, and the cross-attention modules that read a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .sites import Site, WeightSite


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Site):
    """An attention module with a processor: queries, keys, values and the context may be changed.

    Args:
        path, width, context_width, heads: the module that holds `processor`, and its sizes. `index`: its number in the tower.
        cross: True for cross-attention. `plain`: True if queries are to_q(x), at most normalized over their whole width.
        sdpa: True if its tokens alone are the queries and keys of one call of `F.scaled_dot_product_attention`.
    """

    path: str
    width: int
    context_width: int
    heads: int
    cross: bool
    index: int
    plain: bool = True
    sdpa: bool = False


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

    @property
    def sdpa(self) -> bool:
        """True if its tokens alone are the queries and keys of one call of `F.scaled_dot_product_attention`."""
        return self.out.sdpa


@dataclass(frozen=True)
class LayerStates:
    """A forward pre-hook that takes one layer's text states of those that text encoders wrote side by side.

    Args:
        layer: number of the layer, or None for the mean over layers.
        widths: of the text encoders, whose states follow each other: (batch, tokens, L·w₁ + L·w₂) to (batch, tokens, w₁ + w₂).
        written: width of the states to the number of layers of each encoder, 1 for one whose states are those of all layers.
    """

    layer: int | None
    widths: tuple[int, ...]
    written: Mapping[int, tuple[int, ...]]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the text states among the arguments of the module; those of a single layer are left unchanged."""
        return tuple(map(self.take, args)), {name: self.take(value) for name, value in kwargs.items()}

    def take(self, value: Any) -> Any:
        """The states of the layer if a value is the states of all layers, else the value."""
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[-1] not in self.written:
            return value
        counts = self.written[value.shape[-1]]
        encoders = value.split([count * width for count, width in zip(counts, self.widths, strict=True)], -1)
        layers = [states.unflatten(-1, (-1, width)) for states, width in zip(encoders, self.widths, strict=True)]
        if (layer := self.layer) is not None:
            return torch.cat([states[:, :, layer if count > 1 else 0] for states, count in zip(layers, counts, strict=True)], -1)
        first = torch.cat([states[:, :, 0] for states in layers], -1)
        change = [(states - states[:, :, :1]).mean(2) for states in layers]
        return first + torch.cat(change, -1)  # exact for equal layers


@dataclass(frozen=True, eq=False)
class TextReaders:
    """The modules of a denoiser that read text states (batch, tokens, width). Empty for a text encoder without a denoiser.

    Args:
        cross: the cross-attention modules, in the order of the forward pass. `others`: others, such as a pooled embedding.
        widths: of the pipeline's text encoders, whose states are concatenated; all different.
    """

    cross: tuple[nn.Module, ...] = ()
    others: tuple[nn.Module, ...] = ()
    widths: tuple[int, ...] = ()

    def register(self, layers: int) -> list[RemovableHandle]:
        """Registers a hook on each module that takes its states of those of `layers` layers, from one encoder or several."""
        numbers = [*range(len(self.cross)), *(None for _ in self.others)]
        counts = [several for several in product((layers, 1), repeat=len(self.widths)) if max(several, default=1) > 1]
        written = {sum(n * width for n, width in zip(several, self.widths, strict=True)): several for several in counts}
        hooks = [LayerStates(number, self.widths, written) for number in numbers]
        modules = (*self.cross, *self.others)
        return [m.register_forward_pre_hook(h, with_kwargs=True) for m, h in zip(modules, hooks, strict=True)]

    def __deepcopy__(self, memo: Any) -> TextReaders:
        return self
