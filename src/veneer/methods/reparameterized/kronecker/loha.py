"""LoHa: the elementwise product of two low-rank matrices, added to a frozen weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.functional.hadamard import hadamard, hadamard_pair
from veneer.functional.low_rank_autograd import add_product, project
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._state_transfer import loha_state
from veneer.methods.reparameterized._weight_decomposition import AXES, DecomposedAdapter, NormAxis, magnitude_count


class LoHaFactors(Adapter):
    """ΔW = (B1 A1) ∘ (B2 A2).

    Shapes: `up1`, `up2` are B, (d_out, rank); `down1`, `down2` are A, (rank, d_in / groups, *kernel). In the Tucker form A is
    (rank, d_in / groups), with cores `core1`, `core2` (rank, rank, *kernel): A[p, i, …] = Σ_q core[p, q, …] down[q, i].
    """

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite, rank: int, scaling: float, tucker: bool) -> None:
        super().__init__()
        self.site, self.scaling = site, scaling
        width, size = site.d_in // site.groups, math.prod(site.kernel)
        inner = (width,) if tucker else (width, *site.kernel)
        self.up1 = nn.Parameter(torch.randn(site.d_out, rank) * 0.1)
        self.down1 = nn.Parameter(torch.randn(rank, *inner))
        self.up2 = nn.Parameter(torch.zeros(site.d_out, rank))
        self.down2 = nn.Parameter(torch.randn(rank, *inner))
        cores = [nn.Parameter(torch.randn(rank, rank, *site.kernel) * 0.1) if tucker else None for _ in range(2)]
        self.core1, self.core2 = cores
        one_pass = rank * rank * (site.groups * width * size + site.d_out)
        self.factored = one_pass < site.d_out * width * size
        # a training step takes three such passes; the weight form takes one of W's size, for ΔW's gradient
        self.prefers_weight = 3 * one_pass > site.d_out * width * size

    def state_from(self, other: LoHaFactors | None) -> dict[str, Tensor]:
        """State with which this makes the update of `other`, or none. `ValueError` if its rank exceeds this one's."""
        return loha_state(self, other)

    def delta(self) -> Tensor:
        """ΔW in the weight's shape, without scales."""
        first, second = self._down(self.down1, self.core1), self._down(self.down2, self.core2)
        return hadamard(self.up1, first.flatten(1), self.up2, second.flatten(1)).reshape(self.site.weight_shape)

    @staticmethod
    def _down(down: Tensor, core: Tensor | None) -> Tensor:
        """A, (rank, d_in / groups, *kernel)."""
        return down if core is None else torch.einsum("pq...,qi->pi...", core, down)


class LoHaAdapter(LoHaFactors):
    """y' = y + s·ΔW x, W' = W + s·ΔW."""

    adds: ClassVar[bool] = True
    overwrites: ClassVar[bool] = True
    norm_axis: ClassVar[None] = None

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y + s·ΔW x. Uses factors of rank r² if that takes fewer multiplications than ΔW.

        Args:
            x: input of the module. `y`: its output. `overwrite`: y is modified in place.
        """
        site, scale = self.site, self.strength * self.scaling
        geometry = (site.stride, site.padding, site.dilation, site.groups)
        if not self.factored:
            return y + convolve(x, self.delta() * scale, *geometry)
        up, down = hadamard_pair(self.up1, self._down(self.down1, self.core1), self.up2, self._down(self.down2, self.core2))
        up = up.reshape(*up.shape, *(1,) * len(site.kernel))
        if site.kind == "linear":
            return add_product(y, project(x, down) * scale, up, overwrite)
        low = convolve(x, down.repeat(site.groups, *(1,) * (down.ndim - 1)), *geometry) * scale
        return add_product(y, low, up, overwrite) if site.groups == 1 else y + convolve(low, up, groups=site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·ΔW."""
        return weight + self.delta() * (self.strength * self.scaling)


class DecomposedLoHa(LoHaFactors, DecomposedAdapter):
    """W' = m·(W + s·ΔW) / ‖W + s·ΔW‖."""

    def __init__(self, site: WeightSite, rank: int, scaling: float, tucker: bool, axis: NormAxis) -> None:
        super().__init__(site, rank, scaling, tucker)
        self.decompose(axis)


@dataclass(frozen=True)
class LoHa(Method):
    """W' = W + s·(B1 A1) ∘ (B2 A2) with s = alpha / rank: an update of rank up to rank² for twice LoRA's parameters at that rank.

    Args:
        rank: columns of each B and rows of each A, at least 1. Low values suffice: the update has rank up to its square.
        alpha: numerator of the scale (default: the rank, so that s = 1).
        tucker: convolutions with kernels larger than 1×1 get a Tucker core: A = core ×₂ down, with `core` (rank, rank, *kernel).
        norm_axis: weight-decomposed form (DoRA around LoHa), W' = m·(W + s·ΔW) / ‖W + s·ΔW‖ with trained m: the norm per `output`
            or per `input` channel, as in `dora`. Default: the plain form. W' is then computed in each forward pass.
    B2 is initialized to zero; B1 and the cores with standard deviation 0.1, A1 and A2 with 1.
    Convolutions: the kernel is flattened into the rows, ΔW (d_out, d_in·k·k / groups), which includes grouped and depthwise
    ones.
    Counts: 2·rank·(d_out + d_in·k·k / groups) per site, with `tucker` 2·rank·(d_out + d_in / groups + rank·k·k);
    with `norm_axis` d_out or d_in / groups more.
    Source: Yeh et al. (LyCORIS), ICLR 2024, its appendix for `tucker`; the product is FedPara's (Hyeon-Woo et al.,
    ICLR 2022, proposition 1). Initialization follows the LyCORIS library (peft initializes all uniformly and zeroes A2 instead).
    Where that is cheaper, `output` applies the same update as factors of rank rank²; elsewhere W is modified, unless quantized.
    """

    name: ClassVar[str] = "loha"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "style")
    paper: ClassVar[str] = (
        "Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, ICLR 2024; "
        "Hyeon-Woo et al., FedPara, ICLR 2022"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 5e-4

    rank: int = 4
    alpha: float | None = None
    tucker: bool = False
    norm_axis: NormAxis | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("loha", "rank", self.rank, "at least 1")
        if self.norm_axis not in (None, *AXES):
            raise OptionError.of("loha", "norm_axis", self.norm_axis, f"one of {', '.join(AXES)}, or None")

    def build(self, site: WeightSite) -> LoHaFactors:
        """Both pairs of factors for one weight."""
        alpha = self.rank if self.alpha is None else self.alpha
        if self.norm_axis is not None:
            return DecomposedLoHa(site, self.rank, alpha / self.rank, self._tucker_at(site), self.norm_axis)
        return LoHaAdapter(site, self.rank, alpha / self.rank, self._tucker_at(site))

    def count(self, site: WeightSite) -> int:
        """2·rank·(d_out + d_in·k·k / groups), or that of the Tucker form."""
        width, size = site.d_in // site.groups, math.prod(site.kernel)
        inner = width + self.rank * size if self._tucker_at(site) else width * size
        magnitudes = 0 if self.norm_axis is None else magnitude_count(site, self.norm_axis)
        return 2 * self.rank * (site.d_out + inner) + magnitudes

    def _tucker_at(self, site: WeightSite) -> bool:
        return self.tucker and math.prod(site.kernel) > 1
