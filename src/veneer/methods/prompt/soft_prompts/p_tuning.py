"""P-Tuning: soft prompts that an LSTM or an MLP computes during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import PromptSite, Site, TokenSite

from ..class_prompts._context import POSITIONS, Position
from ._prompts import NEEDS, TextPrompts, TokenPrompts, check_tokens

Encoder = Literal["lstm", "mlp", "none"]
INITIAL_STD = 0.02


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM of two layers over the p vectors (p, width), and linear, ReLU, linear after it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, num_layers=2, dropout=dropout, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * (width // 2), width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, table: Tensor) -> Tensor:
        """(p, width) to (p, width)."""
        output: Tensor = self.head(self.lstm(table.unsqueeze(0))[0][0])
        return output


def encoder_of(kind: Encoder, width: int, dropout: float) -> nn.Module | None:
    """The module that computes p vectors (p, width) from a table of the same shape, or None."""
    if kind == "lstm":
        return LSTMEncoder(width, dropout)
    layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return nn.Sequential(*layers) if kind == "mlp" else None


class EncodedTokens(TokenPrompts):
    """`context` (p, width): the input of `encoder`, or the vectors themselves without it."""

    encoder: nn.Module | None

    def __init__(self, site: TokenSite, tokens: int, encoder: nn.Module | None) -> None:
        super().__init__(site, tokens)
        self.context, self.encoder = nn.Parameter(torch.empty(tokens, site.width)), encoder

    def vectors(self) -> Tensor:
        """(p, width)."""
        return self.context if self.encoder is None else self.encoder(self.context)


class EncodedText(TextPrompts):
    """The same in the prompts of classes."""

    encoder: nn.Module | None

    def __init__(self, site: PromptSite, tokens: int, encoder: nn.Module | None, position: Position) -> None:
        super().__init__(site, tokens, position)
        self.encoder = encoder

    def vectors(self) -> Tensor:
        """(p, width)."""
        return self.context if self.encoder is None else self.encoder(self.context)


@dataclass(frozen=True)
class PTuning(Method):
    """f([P; E(x)]) with P = g(H): p vectors of a table H pass an encoder g during training; afterwards P alone is saved.

    g is a bidirectional LSTM of two layers, each direction of half the width, then linear, ReLU, linear (`lstm`), or three linear
    layers with ReLU between them (`mlp`). In the prompts of a CLIP classifier, the vectors are around the class name as in
    `coop`; on an image tower (`where="tokens.tower"`) they are tokens, as in `prompt_tuning`. The function is theirs afterwards.

    Args:
        tokens: p, number of trained vectors, at least 1.
        encoder: `lstm`, `mlp`, or `none`, which trains P directly.
        dropout: dropout probability between the layers of the LSTM, 0 to 1.
        position: position of the class name in prompts of classes: after the vectors, in their middle or before them.
    In a training loop of your own: `attachment.finalize()` after the last step replaces the encoder by its result. An LSTM cannot
    be compiled to one graph; after `finalize` the model can.
    Counts: after training p·width; ViT-B/16 15,360 with p = 20. During training also 14·d² + 18·d for `lstm` and 3·d² +
    3·d for `mlp`, with the even width d; ViT-B/16 8,286,720 and 1,787,136.
    Source: Liu et al., GPT Understands, Too, 2021, section 3.2 and the authors' code (`lstm`, H ~ N(0, 1), layers as torch's);
    `mlp` is that of peft. Deviations: no anchor tokens in the template; `none` starts at N(0, 0.02²); the learning rate is ours.
    """

    name: ClassVar[str] = "p_tuning"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    paper: ClassVar[str] = "Liu, Zheng, Du, Ding, Qian, Yang, Tang, GPT Understands, Too, 2021"
    needs: ClassVar[tuple[Need, ...]] = NEEDS
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    fallback: ClassVar[tuple[str, ...]] = ("tokens.tower",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("encoder",)

    tokens: int = 20
    encoder: Encoder = "lstm"
    dropout: float = 0.0
    position: Position = "end"

    def __post_init__(self) -> None:
        check_tokens(self.name, self.tokens)
        for option, allowed in (("encoder", get_args(Encoder)), ("position", POSITIONS)):
            if getattr(self, option) not in allowed:
                raise OptionError.of(self.name, option, getattr(self, option), f"one of {', '.join(allowed)}")
        if not 0 <= self.dropout < 1:
            raise OptionError.of(self.name, "dropout", self.dropout, "in [0, 1)")

    @classmethod
    def examples(cls) -> tuple[PTuning, PTuning]:
        """For text towers with short prompts."""
        return cls(tokens=4, encoder="mlp"), cls(tokens=2, encoder="lstm", position="middle")

    def build(self, site: TokenSite | PromptSite) -> EncodedTokens | EncodedText:
        """The table and the encoder of one tower.

        Raises:
            TextError: a prompt is too long for the text tower.
        """
        encoder = encoder_of(self.encoder, site.width, self.dropout)
        if isinstance(site, PromptSite):
            adapter: EncodedTokens | EncodedText = EncodedText(site, self.tokens, encoder, self.position)
        else:
            adapter = EncodedTokens(site, self.tokens, encoder)
        nn.init.normal_(adapter.context, std=INITIAL_STD if encoder is None else 1.0)
        return adapter

    def count(self, site: TokenSite | PromptSite) -> int:
        """p·width, and the encoder."""
        d, half = site.width, site.width // 2
        lstm = 2 * (4 * half * (d + half + 2) + 4 * half * (3 * half + 2)) + d * (2 * half + 1) + d * (d + 1)
        return self.tokens * d + {"lstm": lstm, "mlp": 3 * d * (d + 1), "none": 0}[self.encoder]

    @torch.no_grad()
    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Replaces the table by the vectors that the encoder computes from it. Returns the config without the encoder."""
        for _, adapter in adapters:
            training = adapter.training
            adapter.eval()
            adapter.context = nn.Parameter(adapter.vectors().clone())
            adapter.encoder = None
            adapter.train(training)
        options: dict[str, Any] = {"encoder": "none"}
        return dataclasses.replace(self, **options)
