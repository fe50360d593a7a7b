"""PASTA: trained vectors added to the special tokens before the attention of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import StreamSite

MOST = 256
"""Largest number of special tokens that a model may have."""


class SpecialTokenAdapter(Adapter):
    """h_p' = h_p + e_p for the first tokens of the block's input. `vectors`: e (tokens, width). Sequences: (B, N, width)."""

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["enter"]] = "enter"

    def __init__(self, site: StreamSite, tokens: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(zeros(tokens, site.width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the input of the block."""
        count = len(self.vectors)
        special = y[:, :count] + self.vectors * self.strength
        return torch.cat([special.to(y.dtype), y[:, count:]], dim=1)


@dataclass(frozen=True)
class SpecialTokens(Method):
    """h_p' = h_p + e_p at the input of every block, for the special tokens p; every e is initialized to zero.

    Special tokens are the class token of a vision transformer, its distillation and register tokens, and the start token of a
    text. The vectors are added to the stream, so the block's attention, its MLP and later blocks see the change; all other
    tokens are unchanged, and so is the length of the sequence. Models without special tokens (Swin, convolutional networks, mean
    pooling without a class token, UNets, diffusion transformers, T5) are rejected.

    Args:
        tokens: number of special tokens that are adapted, from the first: 1 for the class token alone. 0: all.
    Counts: tokens·width per block; ViT-B/16 9,216.
    Source: Yang et al., Parameter-Efficient Tuning with Special Token Adaptation (PASTA), EACL 2023, section 2, and the authors'
    code. Deviations: vectors are initialized to zero, in the code N(0, 0.02²), and have no dropout; the learning rate is that
    of `bitfit`; their models have [CLS] and [SEP]; the counterpart of [SEP], the end token of a text, has another position in
    each sequence and is not adapted.
    """

    name: ClassVar[str] = "special_tokens"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Yang et al., Parameter-Efficient Tuning with Special Token Adaptation, EACL 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(StreamSite, where={"layout": "NLC", "prefix_tokens": tuple(range(1, MOST + 1))}),)
    default: ClassVar[tuple[str, ...]] = ("block",)
    fallback: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3

    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise OptionError.of(self.name, "tokens", self.tokens, "at least 0")

    def build(self, site: StreamSite) -> SpecialTokenAdapter:
        """e = 0 for one block.

        Raises:
            ValueError: the model has fewer special tokens.
        """
        if self.tokens > site.prefix_tokens:
            message = f"tokens={self.tokens}, but the sequence has {site.prefix_tokens} special tokens; lower it"
            raise OptionError(
                message, option="tokens", method=self.name, where=site.name, given=self.tokens, expected=site.prefix_tokens
            )
        return SpecialTokenAdapter(site, self.tokens or site.prefix_tokens)

    def count(self, site: StreamSite) -> int:
        """tokens·width."""
        return (self.tokens or site.prefix_tokens) * site.width
