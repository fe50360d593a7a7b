"""LayerNorm tuning: trains scales and shifts of the norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite


class DeltaAdapter(Adapter):
    """t' = t + `delta` for a norm's scale or shift t. Only in weight form, which takes no pass over features."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(*shape))

    def weight(self, weight: Tensor) -> Tensor:
        """t + delta."""
        return weight + self.delta * self.strength


@dataclass(frozen=True)
class NormTuning(Method):
    """y = norm(x) ∘ (g + dg) + (b + db) for the norms in the blocks; dg and db are initialized to zero.

    Norms of every kind with a scale or a shift: LayerNorm, RMSNorm, GroupNorm, BatchNorm, whose running statistics are
    updated in training, and saved. The default excludes norms outside of blocks, such as the last one, and those of
    queries and keys; `where=("norm", "bias.norm")` selects all.
    Counts: scales and shifts; ViT-B/16 36,864, with the last norm 38,400.
    Source: Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, ICLR 2024, its "simple"
    form, which trains norms only. Deviations: deltas on a frozen base, so that it can be detached, scaled and combined; the last
    norm is not in the default, though the paper's LLaMA count has it; learning rate as for `bitfit`, the paper does not state it.
    """

    name: ClassVar[str] = "norm_tuning"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Zhao et al., Tuning LayerNorm in Attention, ICLR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(ParamSite, roles=("norm", "norm.*", "bias.norm", "bias.norm.*")),)
    default: ClassVar[tuple[str, ...]] = ("norm@0:", "bias.norm@0:", "not:norm.qk", "not:bias.norm.qk")
    learning_rate: ClassVar[float] = 1e-3

    def build(self, site: ParamSite) -> DeltaAdapter:
        """A zero delta of the tensor's shape."""
        return DeltaAdapter(site.shape)

    def count(self, site: ParamSite) -> int:
        """Number of elements of the tensor."""
        return math.prod(site.shape)
