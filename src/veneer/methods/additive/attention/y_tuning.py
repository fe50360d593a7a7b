"""Y-Tuning: trained label embeddings that attend to the tokens of a frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite

INITIAL_STD = 0.02


class DecoderLayer(nn.Module):
    """Self-attention of the labels, their attention to the tokens, and an MLP, each with a residual and a norm after it."""

    def __init__(self, width: int, heads: int, tokens: int, dropout: float) -> None:
        super().__init__()
        self.labels = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.tokens = nn.MultiheadAttention(width, heads, dropout, kdim=tokens, vdim=tokens, batch_first=True)
        self.hidden, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = dropout

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y: labels (B, K, width); x: tokens (B, N, features)."""
        y = self.norms[0](y + self._drop(self.labels(y, y, y, need_weights=False)[0]))
        y = self.norms[1](y + self._drop(self.tokens(y, x, x, need_weights=False)[0]))
        normed: Tensor = self.norms[2](y + self._drop(self.out(self._drop(F.relu(self.hidden(y))))))
        return normed

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class YTuningAdapter(Adapter):
    """logits' = logits + decoder(Y, tokens) wᵀ. `labels`: Y (classes, width); `score`: w (width,), zero initially."""

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[str] = "tokens"  # type: ignore[assignment]

    def __init__(self, site: FeatureSite, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.labels = nn.Parameter(INITIAL_STD * torch.randn(site.classes, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, site.width, dropout) for _ in range(layers))
        self.score = nn.Parameter(zeros(width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: tokens (B, N, features), or (B, height, width, features); y: logits (B, classes)."""
        tokens = x.flatten(1, -2)
        labels = self.labels.expand(len(tokens), -1, -1)
        for layer in self.layers:
            labels = layer(labels, tokens)
        return y + labels @ self.score * self.strength


@dataclass(frozen=True)
class YTuning(Method):
    """logits'_k = logits_k + w·D(Y, X)_k: embeddings Y of the K labels attend to each other and to the tokens X of a model.

    D has `layers` decoder layers: self-attention of the labels, attention of the labels to the tokens before pooling, and an MLP
    of four times the width, each with a residual and a norm after it. Nothing before the head is changed, so no gradient passes
    through the model. w is zero initially, so that a new adapter leaves the logits unchanged.

    Args:
        width: width of the label embeddings, a multiple of `heads`.
        heads: attention heads of the decoder, at least 1.
        layers: decoder layers, at least 1.
        dropout: dropout probability in the decoder, 0 to 1.
    Supports timm's plain vision transformers. Attention among the labels costs K²; a file is for its own classes only.
    Counts: K·width + width + layers·(14·width² + 2·width·features + 19·width); ViT-B/16 with 100 classes 1,341,440, with the
    width of the model 9,529,344.
    Source: Liu, An, Qiu, Y-Tuning: An Efficient Tuning Paradigm for Large-Scale Pre-Trained Models via Label Representation
    Learning, 2022. The authors have published no code. Chosen here: Y ~ N(0, 0.02²), layers of torch, w zero. Deviations: scores
    are added to the logits of the head, which a classifier trains anyway; the loss is the cross-entropy of the classifier, not a
    margin between the correct label and the best other one.
    """

    name: ClassVar[str] = "y_tuning"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Liu, An, Qiu, Y-Tuning: An Efficient Tuning Paradigm via Label Representation Learning, 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(FeatureSite, roles=("logits",), where={"tokens": ...}),)
    default: ClassVar[tuple[str, ...]] = ("logits",)
    fallback: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3

    width: int = 256
    heads: int = 4
    layers: int = 1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for option in ("heads", "layers"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        if self.width < 1 or self.width % self.heads:
            raise OptionError.of(self.name, "width", self.width, f"a multiple of heads, which is {self.heads}")
        if not 0 <= self.dropout < 1:
            raise OptionError.of(self.name, "dropout", self.dropout, "in [0, 1)")

    @classmethod
    def examples(cls) -> tuple[YTuning, YTuning]:
        """For small models."""
        return cls(width=8, heads=2), cls(width=6, heads=1, layers=2)

    def build(self, site: FeatureSite) -> YTuningAdapter:
        """Embeddings of the classes of one head, and the decoder."""
        return YTuningAdapter(site, self.width, self.heads, self.layers, self.dropout)

    def count(self, site: FeatureSite) -> int:
        """K·width + width + layers·(14·width² + 2·width·features + 19·width)."""
        layer = 14 * self.width**2 + 2 * self.width * site.width + 19 * self.width
        return (site.classes + 1) * self.width + self.layers * layer
