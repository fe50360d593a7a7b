"""Bi-AdaptFormer: a bottleneck parallel to every MLP, with matrices of one bit per entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from veneer.functional.channels import add_channels_product, channels_product
from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite
from veneer.methods.additive.bottleneck._bottleneck import (
    Bottleneck,
    check_bottleneck_options,
    count_bottleneck,
    truncated_normal_,
)

from ._binary_matrices import BinaryMatrices


class BiBottleneck(BinaryMatrices, Bottleneck):
    """y' = y + s·Up_q(Drop(ReLU(Down_q(x)))). Shapes: `down` (h, width), `up` (width, h)."""

    def __init__(self, site: BranchSite, bottleneck: int, scale: float, dropout: float) -> None:
        Bottleneck.__init__(self, site, bottleneck, "relu", scale, dropout, bias=False)
        self.register_matrices()

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the stream before the branch's norm and the branch, both in the site's layout."""
        layout = self.site.layout
        z = self.between(channels_product(x, self.binary("down"), None, layout))
        return add_channels_product(y, z, self.binary("up") * (self.strength * self.scale), None, layout)


@dataclass(frozen=True)
class BiAdaptFormer(Method):
    """y' = y + s·Up_q(Drop(ReLU(Down_q(x)))): y the MLP branch, x the stream before its norm; matrices of one bit per entry.

    W_q = σ·q((W − μ) / (σ + 1e-5)) + μ for both matrices, as in `bi_lora`; a file has one bit per entry and μ, σ of each matrix.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        scale: s, fixed; the authors search 0.01 to 100 for each task.
        dropout: probability of dropping one of the h features in training, in [0, 1).
    A new adapter changes the outputs slightly: Up is normal, with standard deviation 0.001, because zeros have no σ.
    Counts: 2·width·h per branch; ViT-B/16 589,824 bits with h = 32, in 73,728 bytes.
    Source: Jie et al., Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy, ICCV 2023,
    sections 3.2 and 3.3; JieShibo/PETL-ViT `binary_adapter`: no biases, Down Kaiming-uniform with a = sqrt 5, outside the host's
    stochastic depth. Deviations: those of `bi_lora`; any branch may be selected, and convolutional features.
    """

    name: ClassVar[str] = "bi_adaptformer"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Jie et al., Revisiting the Parameter Efficiency of Adapters from Precision Redundancy, ICCV 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 32
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck, dropout=self.dropout)

    def build(self, site: BranchSite) -> BiBottleneck:
        """Down and Up for one branch."""
        adapter = BiBottleneck(site, self.bottleneck, self.scale, self.dropout)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        truncated_normal_(adapter.up, std=1e-3)
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·width·h."""
        return count_bottleneck(site.width, self.bottleneck, bias=False)
