"""CIAT: bottlenecks parallel to every attention and MLP, and one after the embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite, StreamSite

from ._bottleneck import Bottleneck, check_bottleneck_options, count_bottleneck


class LayerBottleneck(Bottleneck):
    """y' = y + A(x): x the input of the branch after its norm."""

    input_port: ClassVar[Literal["normed"]] = "normed"


class EmbeddingBottleneck(Bottleneck):
    """x' = x + A(LN(x)): x the input of the first block. `norm`: LN, or no norm."""

    input_port: ClassVar[Literal["enter"]] = "enter"

    def __init__(self, site: StreamSite, bottleneck: int, dropout: float, norm: bool) -> None:
        super().__init__(site, bottleneck, "relu", dropout=dropout)
        self.norm = nn.LayerNorm(site.width, eps=1e-6) if norm else nn.Identity()

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the input of the first block."""
        return super().output(self.norm(x), y)


@dataclass(frozen=True)
class CIAT(Method):
    """y' = y + Up(Drop(ReLU(Down(x)))) for every attention and MLP y of x, after the norm; x' = x + A(LN(x)) of the embeddings.

    The counter-interference adapter: one set of adapters for each task or domain on a base model that was trained on all of
    them. Layer adapters are parallel to their branches and read the same norm; the embedding adapter changes the input of the
    first block, which is the embedding of patches or words with its positions. Up is initialized to zero.

    Args:
        bottleneck: h, width between Down and Up of the layer adapters, at least 1.
        embedding_bottleneck: the same of the embedding adapter. 0: as `bottleneck`.
        embedding_norm: the embedding adapter has a trained layer norm before Down.
        dropout: probability of dropping one of the h features in training, 0 to 1.
    Where the norm's output is no site's port (UNets, most diffusion transformers, text encoders of pipelines, post-norm blocks),
    a layer adapter reads the stream before the norm. Features with channels first have no embedding adapter.
    Counts: 2·width·h + h + width per branch and for the embedding, whose norm has 2·width more; ViT-B/16 2,479,936 with h = 64,
    without the norm 2,478,400.
    Source: Zhu et al., Counter-Interference Adapter for Multilingual Machine Translation, Findings of EMNLP 2021, section 3, and
    the authors' code: ReLU, dropout between, layer adapters without a norm, the embedding adapter with one (ε 1e-6), before the
    dropout of the embedding, biases zero. Deviations: h = 64, where their default is half of the width, which is 17 % of a
    ViT-B/16; Up zero and Down Kaiming-uniform with a = sqrt 5, where the code initializes both by Keras' Glorot-uniform default
    and so changes the base model's output from the start; the dropout of 0.1 and the learning rate are those of `adaptformer`.
    """

    name: ClassVar[str] = "ciat"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Zhu et al., Counter-Interference Adapter for Multilingual Machine Translation, Findings of EMNLP 2021"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(BranchSite),
        Need(StreamSite, roles=("block",), where={"depth": 0, "d_in": 0, "layout": ("NLC", "NHWC")}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp", "block")
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 64
    embedding_bottleneck: int = 0
    embedding_norm: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck, dropout=self.dropout)
        if self.embedding_bottleneck < 0:
            raise OptionError.of(self.name, "embedding_bottleneck", self.embedding_bottleneck, "at least 0")

    def build(self, site: BranchSite | StreamSite) -> Bottleneck:
        """Down and Up for one branch, or for the embedding."""
        adapter: Bottleneck
        if isinstance(site, StreamSite):
            adapter = EmbeddingBottleneck(site, self._embedding_width, self.dropout, self.embedding_norm)
        else:
            parallel = LayerBottleneck if site.normed else Bottleneck
            adapter = parallel(site, self.bottleneck, "relu", dropout=self.dropout)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        return adapter

    @property
    def _embedding_width(self) -> int:
        return self.embedding_bottleneck or self.bottleneck

    def count(self, site: BranchSite | StreamSite) -> int:
        """2·width·h + h + width, and 2·width for the norm of the embedding adapter."""
        if isinstance(site, StreamSite):
            return count_bottleneck(site.width, self._embedding_width) + (2 * site.width if self.embedding_norm else 0)
        return count_bottleneck(site.width, self.bottleneck)
