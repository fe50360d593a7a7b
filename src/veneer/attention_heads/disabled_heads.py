"""Disables attention heads within a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.injection.seams.attention_call import AttentionCall

from .attention_calls import visit_attention
from .layers import AttentionLayer, HeadsError, attention_layers

How = Literal["uniform", "zero"]


@contextlib.contextmanager
def disabled_heads(model: Any, heads: Mapping[str, Sequence[int]], how: How = "uniform") -> Iterator[None]:
    """Disables heads of a model until the context ends.

    Args:
        heads: names of attention layers (`AttentionLayer.name`) to indices of heads, from 0.
        how: `uniform`: the head reads all tokens alike, with attention 1 / number of tokens, as Kovaleva et al. disable it;
            `zero`: its output is 0, as if it were pruned.
    Raises:
        HeadsError: no such layer, or no such head.
    Source: Kovaleva, Romanov, Rogers, Rumshisky, Revealing the Dark Secrets of BERT, EMNLP 2019, section 4.4.
    """
    layers = {layer.name: layer for layer in attention_layers(model)}
    for name, indices in heads.items():
        if name not in layers:
            raise HeadsError(f"no attention layer {name}; there are {', '.join(layers)}.", given=name, expected=tuple(layers))
        if any(not 0 <= index < layers[name].heads for index in indices):
            message = f"{name} has {layers[name].heads} heads, from 0; got {', '.join(map(str, indices))}."
            raise HeadsError(message, where=name, given=tuple(indices), expected=layers[name].heads)
    if how not in ("uniform", "zero"):
        raise HeadsError(f"how is {how!r}; expected uniform or zero.", where="how", given=how, expected=("uniform", "zero"))

    def visit(layer: AttentionLayer, call: AttentionCall) -> Tensor:
        return without_heads(call, heads[layer.name], how)

    with visit_attention([layers[name] for name in heads], visit):
        yield


def without_heads(call: AttentionCall, heads: Sequence[int], how: How) -> Tensor:
    """The output of attention (batch, heads, tokens, channels) without some heads."""
    output = call.output()
    other = call.uniform().output() if how == "uniform" else torch.zeros_like(output)
    chosen = torch.zeros(output.shape[-3], 1, 1, dtype=torch.bool, device=output.device)
    chosen[list(heads)] = True
    return torch.where(chosen, other, output)
