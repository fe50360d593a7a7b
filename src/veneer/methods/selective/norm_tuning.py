"""LayerNorm tuning: scales and shifts of the norms are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite


class Delta(Adapter):
    """t' = t + `delta` for a norm's scale or shift t. In the tensor alone: that costs no pass over features."""

    adds: ClassVar[bool] = True
    blends: ClassVar[bool] = True

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(*shape))

    def weight(self, weight: Tensor) -> Tensor:
        """t + delta."""
        return weight + self.delta * self.strength


@dataclass(frozen=True)
class NormTuning(Method):
    """y = norm(x) ∘ (g + dg) + (b + db) for the norms in the blocks; dg = db = 0 at the start.

    Norms of every kind that have a scale or a shift: LayerNorm, RMSNorm, GroupNorm, BatchNorm, whose running statistics are
    updated in training as ever, and saved. The default leaves out norms outside of blocks, such as the last one, and those of
    queries and keys; `where=("norm", "bias.norm")` takes all.
    Counts: scales and shifts; ViT-B/16 36,864, with the last norm 38,400.
    Source: Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, ICLR 2024, its "simple"
    form, which trains norms only. Deviations: deltas on a frozen base, so that it detaches, scales and combines; the last norm is
    not in the default, though the paper's LLaMA count has it; learning rate as of `bitfit`, the paper's is not known to us.
    """

    name: ClassVar[str] = "norm_tuning"
    paper: ClassVar[str] = "Zhao et al., Tuning LayerNorm in Attention, ICLR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(ParamSite, roles=("norm", "norm.*", "bias.norm", "bias.norm.*")),)
    default: ClassVar[tuple[str, ...]] = ("norm@0:", "bias.norm@0:", "not:norm.qk", "not:bias.norm.qk")
    learning_rate: ClassVar[float] = 1e-3

    def build(self, site: ParamSite) -> Delta:
        """A zero delta of the tensor's shape."""
        return Delta(site.shape)

    def count(self, site: ParamSite) -> int:
        """The tensor's size."""
        return math.prod(site.shape)
