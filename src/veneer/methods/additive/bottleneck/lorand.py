"""LoRand: a bottleneck after attention and MLP, whose matrices are sums of low-rank products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.channels import add_channels_product, channels_product
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite

Init = Literal["kaiming", "zero"]


class LoRandAdapter(Adapter):
    """y' = y + W' GELU(W y + b) + b' with W = Σ_i (P_i K_i Q_i)ᵀ, and W' alike.

    Shapes, with α branches of rank β: `down_in` P (α, width, β), `kernel` K (α, β, β), `down_out` Q (α, β, h); `up_in` (α, h, β),
    `up_kernel` (α, β, β) or None if K is shared, `up_out` (α, β, width); `down_bias` (h,), `up_bias` (width,).
    """

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["write"]] = "write"
    up_kernel: nn.Parameter | None

    def __init__(self, site: BranchSite, hidden: int, branches: int, rank: int, share_kernel: bool) -> None:
        super().__init__()
        self.site = site
        self.down_in = nn.Parameter(torch.empty(branches, site.width, rank))
        self.kernel = nn.Parameter(torch.empty(branches, rank, rank))
        self.down_out = nn.Parameter(torch.empty(branches, rank, hidden))
        self.down_bias = nn.Parameter(zeros(hidden))
        self.up_in = nn.Parameter(torch.empty(branches, hidden, rank))
        self.up_kernel = None if share_kernel else nn.Parameter(torch.empty(branches, rank, rank))
        self.up_out = nn.Parameter(zeros(branches, rank, site.width))
        self.up_bias = nn.Parameter(zeros(site.width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the branch, in the site's layout. W and W' are applied as products of αβ features, and never computed."""
        layout, strength = self.site.layout, self.strength
        up_kernel = self.kernel if self.up_kernel is None else self.up_kernel
        low = channels_product(x, _stacked(self.down_in), None, layout)
        hidden = F.gelu(channels_product(low, _joined(self.kernel, self.down_out), self.down_bias, layout))
        low = channels_product(hidden, _stacked(self.up_in), None, layout)
        up = _joined(up_kernel, self.up_out) * strength
        return add_channels_product(y, low, up, self.up_bias * strength, layout)


def _stacked(inner: Tensor) -> Tensor:
    """P of every branch as one matrix: (α, d, β) to (αβ, d)."""
    return inner.mT.flatten(0, 1)


def _joined(kernel: Tensor, outer: Tensor) -> Tensor:
    """K Q of every branch as one matrix: (α, β, β) and (α, β, d) to (d, αβ)."""
    return (kernel @ outer).flatten(0, 1).mT


@dataclass(frozen=True)
class LoRand(Method):
    """y' = y + W' GELU(W y + b) + b': y attention or MLP branch; W = Σ_i (P_i K_i Q_i)ᵀ and W' are sums of α products of rank β.

    Args:
        branches: α, number of products, at least 1.
        rank: β, at least 1.
        reduction: h = width // reduction features between W and W', at least 1.
        share_kernel: W and W' have the same matrices K_i.
        init: initialization of W' and b': `kaiming` as W and b, or `zero`, with which a new adapter leaves the output unchanged.
    Counts: 2·α·β·(width + h) + α·β² + h + width per branch, and α·β² more with separate K; ViT-B/16 915,456, Swin-B 1,197,312,
    with separate K 918,528 and 1,203,456.
    Source: Yin et al., 1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions, CVPR 2023, with shared K;
    site, GELU, h and initialization as in the code of LoRand in the authors' later CoLin, where K is separate and α = 4: P, K and
    Q Kaiming-uniform with a = sqrt 5 as matrices (d, β), (β, β), (β, d), biases within 1 / sqrt(inputs). Deviation: any branch
    may be selected; W and W' are not computed, which takes fewer operations.
    """

    name: ClassVar[str] = "lorand"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Yin et al., 1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions, CVPR 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4

    branches: int = 2
    rank: int = 8
    reduction: int = 2
    share_kernel: bool = True
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        for option in ("branches", "rank", "reduction"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        if self.init not in get_args(Init):
            raise OptionError.of(self.name, "init", self.init, f"one of {', '.join(get_args(Init))}")

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Shared and separate K."""
        return cls(), cls(branches=3, rank=4, share_kernel=False)

    def width_at(self, site: BranchSite) -> int:
        """h at a site."""
        return max(1, site.width // self.reduction)

    def build(self, site: BranchSite) -> LoRandAdapter:
        """P, K and Q of both matrices, and their biases, for one branch."""
        adapter = LoRandAdapter(site, self.width_at(site), self.branches, self.rank, self.share_kernel)
        for weight in (adapter.down_in, adapter.kernel, adapter.down_out, adapter.up_in, adapter.up_kernel):
            if weight is not None:
                _initialize(weight, weight.shape[-1])
        _initialize(adapter.down_bias, site.width)
        if self.init == "kaiming":
            _initialize(adapter.up_out, site.width)
            _initialize(adapter.up_bias, self.width_at(site))
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·α·β·(width + h) + α·β² + h + width, and α·β² with separate K."""
        width, hidden, kernel = site.width, self.width_at(site), self.branches * self.rank**2
        factors = 2 * self.branches * self.rank * (width + hidden)
        return factors + kernel * (1 if self.share_kernel else 2) + hidden + width


def _initialize(tensor: nn.Parameter, inputs: int) -> None:
    """Fills a tensor uniformly within 1 / sqrt(inputs), as Kaiming-uniform with a = sqrt 5."""
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(tensor, -bound, bound)
