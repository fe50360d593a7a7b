"""BitFit: trains only the biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite


class BitFitAdapter(Adapter):
    """b' = b + db. A bias that its module adds last may also be changed at the output."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, shape: Sequence[int], channel_dim: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(*shape))
        self.channel_dim = channel_dim

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y + db along the channel dimension."""
        shape = [1] * y.ndim
        shape[self.channel_dim] = -1
        return y + (self.delta * self.strength).view(shape)

    def weight(self, weight: Tensor) -> Tensor:
        """b + db."""
        return weight + self.delta * self.strength


@dataclass(frozen=True)
class BitFit(Method):
    """y = W x + (b + db): every existing bias gets a trained delta, initialized to zero.

    Layers without a bias are skipped (adding biases would be another method). By default heads are excluded: train them as base
    parameters (`train=("head",)`), with `linear_probe` in addition, or select `where="bias"`. A key bias shifts all logits of a
    query alike, so attention ignores it: it is counted, as in the paper, but has no effect.
    Counts: the number of biases; ViT-B/16 102,912 (without the head), SD 1.5 UNet 343,684.
    Source: Ben Zaken, Ravfogel, Goldberg, BitFit, ACL 2022, section 3. Deviation: a delta on frozen biases instead of
    unfrozen ones, so that it can be detached, scaled and combined; the function class is the same.
    """

    name: ClassVar[str] = "bitfit"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Ben Zaken, Ravfogel, Goldberg, BitFit, ACL 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(ParamSite, roles=("bias", "bias.*")),)
    default: ClassVar[tuple[str, ...]] = ("bias", "not:bias.head")
    learning_rate: ClassVar[float] = 1e-3

    def build(self, site: ParamSite) -> BitFitAdapter:
        """A zero delta of the bias's shape."""
        return BitFitAdapter(site.shape, site.channel_dim)

    def count(self, site: ParamSite) -> int:
        """Number of elements of the bias."""
        return math.prod(site.shape)
