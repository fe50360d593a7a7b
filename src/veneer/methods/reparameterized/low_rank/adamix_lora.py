"""AdaMix with LoRA: several experts of A and B, sampled in training and averaged at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.functional.convolve import convolve
from veneer.functional.low_rank_autograd import project
from veneer.injection.errors import OptionError
from veneer.injection.method import Need
from veneer.injection.sites import WeightSite
from veneer.methods.additive.experts._experts import ExpertAdapter, ExpertMethod, stack_of

from ._low_rank import by_group, factor_pairs, pair_of_each_group, product_of_pair
from .lora import LoRA


class AdaMixLoRAAdapter(ExpertAdapter):
    """y' = y + s·B_j(A_i x), W' = W + s·B̄ Ā. Shapes: `down` and `up` as in LoRA, after the number of experts, or 1 if shared."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite, down: Tensor, up: Tensor, scaling: float, dropout: float) -> None:
        super().__init__(site)
        self.scaling, self.dropout = scaling, dropout
        self.pairs = factor_pairs(site, down.shape[1])
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: input and output of the module."""
        site, scale = self.site, self.strength * self.scaling
        down, up = self.expert(self.down, 0), self.expert(self.up, 1)
        x = F.dropout(x, self.dropout, self.training)
        if site.kind == "linear":
            return y + F.linear(project(x, down) * scale, up)
        geometry = (site.stride, site.padding, site.dilation, site.groups)
        if self.pairs != site.groups:
            return y + convolve(x, product_of_pair(site, self.pairs, down, up) * scale, *geometry)
        return y + convolve(convolve(x, down, *geometry) * scale, up, groups=site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·B A with the experts of this pass, or their averages."""
        product = product_of_pair(self.site, self.pairs, self.expert(self.down, 0), self.expert(self.up, 1))
        return weight + product * (self.strength * self.scaling)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) of a LoRA with the averages; if groups share A, each gets a copy."""
        return pair_of_each_group(self.site, self.pairs, self.down.mean(0), self.up.mean(0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """C (groups, d_out / groups, rank) and D (groups, rank, width) of the averages, s in C."""
        left, right = by_group(self.site, *self.pair())
        return left * (self.strength * self.scaling), right


@dataclass(frozen=True)
class AdaMixLoRA(ExpertMethod):
    """W' = W + s·B_j A_i with s = alpha / rank: i and j sampled for each training pass and site among M experts.

    In evaluation and in merges A and B are averaged separately, and after training only their averages are saved: a LoRA. The
    second pass and the loss of `consistency` are those of `adamix`.

    Args:
        rank: rank of the update, at least 1.
        alpha: numerator of the scale s (default: the rank, so that s = 1).
        experts: M, at least 1.
        share_down: all experts have the same A.
        share_up: all experts have the same B.
        dropout: probability of dropping an input feature of A in training, 0 to 1.
        consistency: weight of the consistency loss, at least 0; 0 saves the second pass.
    Linear and convolutional layers, as `lora`. A training loop of your own calls what `adamix` lists.
    Counts: rank·(M·d_in·k·k + d_out) / groups per site with a shared B, after training LoRA's; ViT-B/16's q and v 737,280 and
    294,912 with rank 8, M = 4.
    Source: Wang et al., AdaMix, EMNLP 2022, section 3.3, and the authors' code for GPT-2: A Kaiming-uniform with a = sqrt 5, B
    zero, equal copies at the start. Deviations: the code multiplies the consistency loss by 100, here `consistency` is 1 as for
    its adapters; q, k and v are separate sites, with A and B for each, where its fused layer samples once for q and v.
    """

    name: ClassVar[str] = "adamix_lora"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Wang et al., AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, EMNLP 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn.{q,v}", "xattn.{q,v}")
    fallback: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp", "conv")
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("consistency",)

    rank: int = 8
    alpha: float | None = None
    experts: int = 4
    share_down: bool = False
    share_up: bool = True
    dropout: float = 0.0
    consistency: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of(self.name, "rank", self.rank, "at least 1")
        if not 0 <= self.dropout < 1:
            raise OptionError.of(self.name, "dropout", self.dropout, "in [0, 1)")
        self.check_expert_options()

    def _lora(self) -> LoRA:
        return LoRA(rank=self.rank, alpha=self.alpha)

    def build(self, site: WeightSite) -> AdaMixLoRAAdapter:
        """M equal copies of LoRA's initial matrices."""
        one = self._lora().build(site)
        down, up = (stack_of(matrix, copies) for matrix, copies in zip((one.down, one.up), self.stacks(), strict=True))
        return AdaMixLoRAAdapter(site, down.data, up.data, one.scaling, self.dropout)

    def count(self, site: WeightSite) -> int:
        """M times A and once B with a shared B."""
        downs, ups = self.stacks()
        of_up = site.d_out * (self.rank // factor_pairs(site, self.rank))
        return downs * (self._lora().count(site) - of_up) + ups * of_up
