"""VeRA: one pair of random low-rank factors for all layers, and two trained vectors per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


class RandomFactors(nn.Module):
    """A (rank, widest input) and B (widest output, rank), frozen; a layer uses the first columns of A and rows of B."""

    A: Tensor
    B: Tensor

    def __init__(self, d_out: int, d_in: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("A", nn.init.kaiming_uniform_(torch.empty(rank, d_in)))
        self.register_buffer("B", nn.init.kaiming_uniform_(torch.empty(d_out, rank)))


class VeRAAdapter(Adapter):
    """y' = y + b ∘ B (d ∘ A x), W' = W + diag(b) B diag(d) A. Shapes: `b` (d_out,), `d` (rank,)."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    shared: RandomFactors

    def __init__(self, site: WeightSite, rank: int, d_initial: float) -> None:
        super().__init__()
        self.site = site
        self.b = nn.Parameter(torch.zeros(site.d_out))
        self.d = nn.Parameter(torch.full((rank,), d_initial))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the module's input; y: its output. A grouped convolution applies A in every group."""
        site, (A, B) = self.site, self._pair()
        ones = (1,) * len(site.kernel)
        low = convolve(x, A.repeat(site.groups, *(1,) * (A.ndim - 1)), site.stride, site.padding, site.dilation, site.groups)
        low = low * (self.d * self.strength).repeat(site.groups).view(-1, *ones)
        return y + convolve(low, B.view(*B.shape, *ones), groups=site.groups) * self.b.view(-1, *ones)

    def weight(self, weight: Tensor) -> Tensor:
        """W + diag(b) B diag(d) A."""
        A, B = self._pair()
        change = (self.b.unsqueeze(1) * B * (self.d * self.strength)) @ A.flatten(1)
        return weight + change.reshape(self.site.weight_shape)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """A (rank, d_in / groups, *kernel) and B (d_out, rank) of this layer."""
        shape = self.site.weight_shape
        A = self.shared.A[:, : math.prod(shape[1:])].reshape(-1, *shape[1:])
        return A, self.shared.B[: shape[0]]


@dataclass(frozen=True)
class VeRA(Method):
    """W' = W + diag(b) B diag(d) A: A and B random, frozen and shared by all layers; trains b and d, b initialized to zero.

    Args:
        rank: columns of B and rows of A, at least 1; large, because each unit costs one parameter per layer.
        d_initial: initial value of d, not 0.
    A and B are as large as the largest layer of the tower needs; others use their first columns and rows. They are saved once
    with the adapter. Convolutions: kernels are flattened, A has d_in·k·k / groups columns.
    Counts: d_out + rank per site; ViT-B/16's q, k and v as one weight, rank 256: 30,720.
    Source: Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, ICLR 2024, equation 2 and section 3.3. Initialization
    (Kaiming-uniform) and slicing as in peft. A and B are saved instead of the paper's seed, because random numbers depend on
    the version of torch.
    """

    name: ClassVar[str] = "vera"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "classification", "smallest_file")
    paper: ClassVar[str] = "Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, ICLR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 1e-2
    shared_options: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 256
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("vera", "rank", self.rank, "at least 1")
        if not self.d_initial:
            message = "vera: d_initial must not be 0: b is initialized to 0 as well, so all gradients would stay 0"
            raise OptionError(message, option="d_initial", method=self.name, given=self.d_initial)

    def build_shared(self, sites: Sequence[WeightSite]) -> RandomFactors:
        """A and B for the largest of the sites."""
        widest = max(math.prod(site.weight_shape[1:]) for site in sites)
        return RandomFactors(max(site.d_out for site in sites), widest, self.rank)

    def build(self, site: WeightSite) -> VeRAAdapter:
        """b and d for one weight."""
        return VeRAAdapter(site, self.rank, self.d_initial)

    def count(self, site: WeightSite) -> int:
        """b and d."""
        return site.d_out + self.rank
