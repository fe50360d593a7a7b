"""MLAE: a low-rank update as experts of rank 1, with adaptive coefficients that are masked at random in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._computed_pair import ComputedPairAdapter

from ._low_rank import factor_pairs


class MLAEAdapter(ComputedPairAdapter):
    """W' = W + Σ_e m_e λ_e b_e a_eᵀ: `down` has the rows a_e, `values` is λ, `up` has the columns b_e. Shapes as `lora`."""

    def __init__(self, site: WeightSite, rank: int, start: float, mask: float) -> None:
        super().__init__(site, rank, 1.0)
        self.mask = mask
        ones = (1,) * len(site.kernel)
        self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
        self.values = nn.Parameter(torch.full((rank,), start))
        self.up = nn.Parameter(zeros(site.d_out, rank // self.pairs, *ones))

    def computed_pair(self, training: bool) -> tuple[Tensor, Tensor]:
        """A with rows m_e λ_e a_e, and B. `training`: m_e is 0 with probability p, else 1 / (1 − p); otherwise 1."""
        values = F.dropout(self.values, self.mask, training)
        return self.down * values.view(-1, *(1 for _ in self.down.shape[1:])), self.up


@dataclass(frozen=True)
class MLAE(Method):
    """W' = W + Σ_e m_e λ_e b_e a_eᵀ: experts e of rank 1 with trained coefficients λ and a random mask m in training.

    Each training pass samples a mask for each site: m_e is 0 with probability `mask` and 1 / (1 − `mask`) otherwise, the same for
    all images and tokens. In evaluation and merges all experts are used, m = 1.

    Args:
        rank: number of experts per site, at least 1.
        start: initial value of every λ.
        mask: probability of masking an expert in a training pass, in [0, 1).
    Convolutions: as `lora`, the experts split over groups.
    Counts: rank·(d_in·k·k + d_out) / groups + rank per site; ViT-B/16's fused qkv, rank 8: 295,008.
    Source: Wang et al., MLAE: Masked LoRA Experts for Visual Parameter-Efficient Fine-Tuning, 2024, and jie040109/MLAE: a is
    Kaiming-uniform with a = sqrt 5, b zero. Deviations: the repository has a single layer, and neither the paper's settings nor
    the layers that it adapts, so the defaults of sites, rank and mask are chosen here. Only stochastic masks are implemented, as
    in the code. The code's dropout of inputs has a default of 0 and is left out.
    """

    name: ClassVar[str] = "mlae"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Wang et al., MLAE: Masked LoRA Experts for Visual Parameter-Efficient Fine-Tuning, 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 8
    start: float = 1.0
    mask: float = 0.5

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of(self.name, "rank", self.rank, "at least 1")
        if not 0 <= self.mask < 1:
            raise OptionError.of(self.name, "mask", self.mask, "in [0, 1)")
        if self.start == 0:
            raise OptionError.of(self.name, "start", self.start, "not 0, because b is initialized to zero")

    def build(self, site: WeightSite) -> MLAEAdapter:
        """Experts for one weight."""
        adapter = MLAEAdapter(site, self.rank, self.start, self.mask)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        return adapter

    def count(self, site: WeightSite) -> int:
        """rank·(d_in·k·k + d_out) / groups + rank; rank·(d_in·k·k / groups + d_out + 1) if groups do not divide the rank."""
        width = math.prod(site.weight_shape[1:])
        return self.rank * (width + 1) + site.d_out * (self.rank // factor_pairs(site, self.rank))
