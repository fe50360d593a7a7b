"""Bi-LoRA: a LoRA with factors of one bit per entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import WeightSite
from veneer.methods.additive.bottleneck._bottleneck import truncated_normal_
from veneer.methods.reparameterized._computed_pair import ComputedPairAdapter
from veneer.methods.reparameterized.low_rank._low_rank import factor_pairs

from ._binary_matrices import BinaryMatrices


class BiLoRAAdapter(BinaryMatrices, ComputedPairAdapter):
    """y' = y + s·B_q(Drop(A_q x)), W' = W + s·B_q A_q. Shapes of `down` and `up` as in `lora`."""

    def __init__(self, site: WeightSite, rank: int, scale: float, dropout: float) -> None:
        ComputedPairAdapter.__init__(self, site, rank, scale, dropout)
        ones = (1,) * len(site.kernel)
        self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
        self.up = nn.Parameter(torch.empty(site.d_out, rank // self.pairs, *ones))
        self.register_matrices()

    def computed_pair(self, training: bool) -> tuple[Tensor, Tensor]:
        """A_q and B_q."""
        return self.binary("down"), self.binary("up")


@dataclass(frozen=True)
class BiLoRA(Method):
    """W' = W + s·B_q A_q: each matrix has two values, μ ± 0.674 σ, and a file has one bit per entry and μ, σ of each matrix.

    W_q = σ·q((W − μ) / (σ + 1e-5)) + μ, where the trained W has full precision, μ and σ are its mean and standard deviation, and
    q(w) = ±0.674 by the sign of w has the gradient of the identity. Training that continues from a file gets W of two values.

    Args:
        rank: rank of the update, at least 1.
        scale: s, fixed; the authors search 0.01 to 100 for each task.
        dropout: probability of dropping one of the `rank` features A_q x in training, in [0, 1).
    Convolutions: as `lora`. Weight decay acts on W.
    A new adapter changes the outputs slightly: B is normal, with standard deviation 0.001, because zeros have no σ.
    Counts: rank·(d_in·k·k + d_out) / groups per site, as `lora`; ViT-B/16's q and v, rank 32: 1,179,648 bits in 147,456 bytes.
    Source: Jie et al., Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy, ICCV 2023,
    sections 3.2 and 3.3; JieShibo/PETL-ViT `binary_adapter`: A Kaiming-uniform with a = sqrt 5, B truncated normal. Deviations:
    one bit only, where the code also has 2, 4 and 8; an entry equal to μ is the lower value, where the code gives it μ; the
    authors' 1-bit classification head is not implemented. If groups share A, there is no dropout.
    """

    name: ClassVar[str] = "bi_lora"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Jie et al., Revisiting the Parameter Efficiency of Adapters from Precision Redundancy, ICCV 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn.{q,v}", "xattn.{q,v}")
    fallback: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp", "conv")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 32
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of(self.name, "rank", self.rank, "at least 1")
        if not 0 <= self.dropout < 1:
            raise OptionError.of(self.name, "dropout", self.dropout, "in [0, 1)")

    def build(self, site: WeightSite) -> BiLoRAAdapter:
        """A and B for one weight."""
        adapter = BiLoRAAdapter(site, self.rank, self.scale, self.dropout)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        truncated_normal_(adapter.up, std=1e-3)
        return adapter

    def count(self, site: WeightSite) -> int:
        """Entries of A and B."""
        width = math.prod(site.weight_shape[1:])
        return self.rank * width + site.d_out * (self.rank // factor_pairs(site, self.rank))
