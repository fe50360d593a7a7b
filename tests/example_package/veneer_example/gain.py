"""Gain: one trained factor an output feature, in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection import Adapter, Method, Need
from veneer.injection.sites import WeightSite


class GainAdapter(Adapter):
    """W' = diag(1 + g) W. Shape: `gain` (d_out,)."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(d_out))

    def weight(self, weight: Tensor) -> Tensor:
        """W with its rows scaled; biases stay as they are."""
        return weight * (1 + self.gain).view(-1, *[1] * (weight.dim() - 1))


@dataclass(frozen=True)
class Gain(Method):
    """W' = diag(1 + start + g) W: every output feature is scaled by a trained factor; g = 0 at the start.

    Args:
        start: added to every gain; 0 begins as the base does.
    Counts: d_out per site.
    Source: the rescaling of Liu et al., (IA)³, NeurIPS 2022, section 3.3. Deviation: it scales the weight, not the
    activation, so that it merges also where there is a bias.
    """

    name: ClassVar[str] = "gain"
    paper: ClassVar[str] = "after Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, NeurIPS 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("mlp", "attn")

    start: float = 0.0

    def build(self, site: WeightSite) -> GainAdapter:
        """Gains of one weight."""
        adapter = GainAdapter(site.d_out)
        nn.init.constant_(adapter.gain, self.start)
        return adapter

    def count(self, site: WeightSite) -> int:
        """d_out."""
        return site.d_out
