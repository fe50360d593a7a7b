"""Low-rank updates whose factors are computed from other parameters in each forward pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from veneer.functional.convolve import convolve
from veneer.functional.low_rank_autograd import project
from veneer.injection.method import Adapter
from veneer.injection.sites import WeightSite

from .low_rank._low_rank import by_group, factor_pairs, pair_of_each_group, product_of_pair


class ComputedPairAdapter(Adapter):
    """y' = y + s·B(Drop(A x)), W' = W + s·B A on linear layers and convolutions, where a subclass computes A and B.

    Args:
        rank: rows of A, split over groups as in `lora`. `scaling`: s. `dropout`: probability of dropping one of the features A x.
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.site, self.scaling, self.dropout = site, scaling, dropout
        self.pairs = factor_pairs(site, rank)

    @abstractmethod
    def computed_pair(self, training: bool) -> tuple[Tensor, Tensor]:
        """A and B in the shapes of `LoRAAdapter`. `training`: with the random masks of a training pass."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: input of the module. `y`: its output."""
        site, (down, up), scale = self.site, self.computed_pair(self.training), self.strength * self.scaling
        geometry = (site.stride, site.padding, site.dilation, site.groups)
        if self.pairs != site.groups:
            return y + convolve(x, product_of_pair(site, self.pairs, down, up) * scale, *geometry)
        low = project(x, down) if site.kind == "linear" else convolve(x, down, *geometry)
        low = torch.nn.functional.dropout(low, self.dropout, self.training) * scale
        return y + convolve(low, up, groups=site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·B A, in W's shape."""
        product = product_of_pair(self.site, self.pairs, *self.computed_pair(self.training))
        return weight + product * (self.strength * self.scaling)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the same update as a LoRA with this scale; if groups share A, each gets a copy."""
        return pair_of_each_group(self.site, self.pairs, *self.computed_pair(training=False))

    def factors(self) -> tuple[Tensor, Tensor]:
        """C (groups, d_out / groups, rank) and D (groups, rank, width), s in C: W' = W + C D with W flattened by groups."""
        left, right = by_group(self.site, *self.pair())
        return left * (self.strength * self.scaling), right
