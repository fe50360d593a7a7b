"""Compacter: bottlenecks whose matrices are sums of Kronecker products with factors shared by all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.channels import add_channels_product, channels_product
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite

from ._bottleneck import check_bottleneck_options


class KroneckerRules(nn.Module):
    """`rules`: A_1 … A_n, (n, n, n), shared by Down and Up of all layers of a tower."""

    def __init__(self, order: int, std: float) -> None:
        super().__init__()
        self.rules = nn.Parameter(nn.init.normal_(torch.empty(order, order, order), std=std))


class CompacterAdapter(Adapter):
    """y' = y + Up(GELU(Down(y))) with Down = Σ_i (A_i ⊗ s_i t_i)ᵀ, and Up alike.

    Shapes for rank r: `down_left` s (n, width / n, r), `down_right` t (n, r, h / n), `up_left` (n, h / n, r), `up_right`
    (n, r, width / n), `down_bias` (h,), `up_bias` (width,).
    """

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["write"]] = "write"
    shared: KroneckerRules

    def __init__(self, site: BranchSite, bottleneck: int, order: int, rank: int) -> None:
        super().__init__()
        self.site = site
        wide, narrow = site.width // order, bottleneck // order
        self.down_left = nn.Parameter(torch.empty(order, wide, rank))
        self.down_right = nn.Parameter(torch.empty(order, rank, narrow))
        self.up_left = nn.Parameter(torch.empty(order, narrow, rank))
        self.up_right = nn.Parameter(torch.empty(order, rank, wide))
        self.down_bias = nn.Parameter(zeros(bottleneck))
        self.up_bias = nn.Parameter(zeros(site.width))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the branch, in the site's layout."""
        layout, strength = self.site.layout, self.strength
        z = channels_product(x, self._matrix(self.down_left, self.down_right), self.down_bias, layout)
        up = self._matrix(self.up_left, self.up_right) * strength
        return add_channels_product(y, F.gelu(z, approximate="tanh"), up, self.up_bias * strength, layout)

    def _matrix(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ_i (A_i ⊗ left_i right_i)ᵀ, (outputs, inputs)."""
        product = torch.einsum("iab,ikp->bpak", self.shared.rules, left @ right)
        return product.flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Compacter(Method):
    """y' = y + Up(GELU(Down(y))), y the output of the attention or the MLP: Down and Up are sums Σ_i A_i ⊗ s_i t_i.

    The n matrices A_i, (n, n), are shared by both matrices of all layers; s_i and t_i of rank 1 belong to one matrix. With
    `where="mlp"` this is Compacter++.

    Args:
        bottleneck: h, width between Down and Up, a multiple of `order`.
        order: n, number of Kronecker products, at least 1; it must divide the width of the branch.
        rank: rank of the products s_i t_i, at least 1.
        std: standard deviation of the initial A_i, above 0.
    Counts: n³ for all layers, and rank·2·(width + h) + h + width per branch; ViT-B/16 57,088, Compacter++ 28,576.
    Source: Karimi Mahabadi et al., Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, NeurIPS 2021, section 4;
    rabeehk/compacter: n = 4, h = width / 32, s and t Xavier-uniform with gain sqrt 2, biases zero, tanh form of GELU. As A is
    small, a new adapter changes the outputs by rounding errors only, and the learning rate is high. Deviations: h is given as a
    number, 24 for a width of 768; the authors also train the norms, which is `train="norm"` here.
    """

    name: ClassVar[str] = "compacter"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Karimi Mahabadi et al., Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, NeurIPS 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-3
    shared_options: ClassVar[tuple[str, ...]] = ("order", "std")

    bottleneck: int = 24
    order: int = 4
    rank: int = 1
    std: float = 1e-4

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck)
        for option in ("order", "rank"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        if self.bottleneck % self.order:
            raise OptionError.of(self.name, "bottleneck", self.bottleneck, f"a multiple of order, {self.order}")
        if not self.std > 0:
            raise OptionError.of(self.name, "std", self.std, "above 0")

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Large initial A, which small models show beyond rounding errors."""
        return cls(bottleneck=8, std=0.5), cls(bottleneck=8, order=2, rank=2, std=0.5)

    def build_shared(self, sites: Sequence[BranchSite]) -> KroneckerRules:
        """A_1 … A_n."""
        return KroneckerRules(self.order, self.std)

    def build(self, site: BranchSite) -> CompacterAdapter:
        """s, t and the biases of one branch.

        Raises:
            OptionError: `order` does not divide the width.
        """
        if site.width % self.order:
            message = f"compacter: order {self.order} must divide the width of the branch, {site.width}; set a divisor of it."
            raise OptionError(message, option="order", method=self.name, given=self.order, expected=site.width)
        adapter = CompacterAdapter(site, self.bottleneck, self.order, self.rank)
        for factors in (adapter.down_left, adapter.down_right, adapter.up_left, adapter.up_right):
            bound = math.sqrt(2) * math.sqrt(6 / (factors.shape[1] + factors.shape[2]))
            nn.init.uniform_(factors, -bound, bound)
        return adapter

    def count(self, site: BranchSite) -> int:
        """rank·2·(width + h) + h + width."""
        return (2 * self.rank + 1) * (site.width + self.bottleneck)
