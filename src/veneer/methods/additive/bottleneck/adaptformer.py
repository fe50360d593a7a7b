"""AdaptFormer: a bottleneck parallel to every MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite

from ._bottleneck import Bottleneck, check_bottleneck_options, count_bottleneck


@dataclass(frozen=True)
class AdaptFormer(Method):
    """y' = y + s·Up(Drop(ReLU(Down(x)))): y the MLP branch, x the stream before the branch's norm; Up is initialized to zero.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        scale: s, fixed.
        dropout: probability of dropping one of the h features in training, 0 to 1.
        bias: Down and Up have biases.
    Counts: 2·width·h + h + width per branch, without biases 2·width·h; ViT-B/16 1,189,632 with h = 64 and 156,768 with h = 8.
    Source: Chen et al., AdaptFormer, NeurIPS 2022, section 3.2, and the authors' code: x before the norm, no additional norm,
    Down Kaiming-uniform with a = sqrt 5, biases zero, outside the host's stochastic depth. Deviation: any branch may be
    selected, and convolutional features, where Down and Up are 1×1 convolutions.
    """

    name: ClassVar[str] = "adaptformer"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, NeurIPS 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    bias: bool = True

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck, dropout=self.dropout)

    def build(self, site: BranchSite) -> Bottleneck:
        """Down and Up for one branch."""
        adapter = Bottleneck(site, self.bottleneck, "relu", self.scale, self.dropout, bias=self.bias)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·width·h + h + width."""
        return count_bottleneck(site.width, self.bottleneck, self.bias)
