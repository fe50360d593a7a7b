"""DiffuseKronA: a Kronecker product of two matrices of configurable shape, added to a frozen weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.functional.kronecker import kron_apply, kron_weight
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


class DiffuseKronAAdapter(Adapter):
    """y' = y + P(A ⊗ B) x, W' = W + P(A ⊗ B). Shapes: `left` A (a1, a2), `right` B (d_out / a1, d_in / groups / a2, *kernel)."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite, a1: int, a2: int, permuted: bool) -> None:
        super().__init__()
        self.site, self.permuted = site, permuted
        self.left = nn.Parameter(torch.randn(a1, a2) / a1)
        self.right = nn.Parameter(torch.zeros(site.d_out // a1, site.d_in // site.groups // a2, *site.kernel))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the module's input; y: its output. Applies A and B in sequence; materializes ΔW only for grouped convolutions."""
        site = self.site
        if site.groups == 1:
            return y + kron_apply(x, self.left * self.strength, self._right_apply, len(site.kernel), self.permuted)
        return y + convolve(x, self.delta() * self.strength, site.stride, site.padding, site.dilation, site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + P(A ⊗ B)."""
        return weight + self.delta() * self.strength

    def delta(self) -> Tensor:
        """P(A ⊗ B) in the weight's shape."""
        return kron_weight(self.left, self.right, self.permuted)

    def _right_apply(self, x: Tensor) -> Tensor:
        return convolve(x, self.right, self.site.stride, self.site.padding, self.site.dilation)


@dataclass(frozen=True)
class DiffuseKronA(Method):
    """W' = W + P(A ⊗ B): A is a1 × a2, B is b1 × b2 with a1·b1 = d_out and a2·b2 = d_in, both full, without a scale.

    Args:
        a1, a2: shape of A, each at least 1; a1 must divide d_out, a2 must divide d_in.
        permuted: P as in the authors' code, where row j·a1 + i of the update is A[i] ⊗ B[j]. False for the paper's plain A ⊗ B,
            where it is row i·b1 + j. Adapters of the two kinds differ only by a permutation of outputs.
    B is initialized to zero, A with standard deviation 1 / a1.
    Compared with `lokr`: a1 and a2 are set independently and A may be the larger factor, where LoKr's C takes the smaller part of
    both widths; no factor is of low rank and there is no alpha / rank; A is normal with 1 / a1, not Kaiming-uniform; and the rows
    are permuted. With permuted=False and the same shapes both compute C ⊗ D.
    Convolutions (not in the paper): B has the kernel, and d_in means d_in / groups, which a2 must divide.
    Counts: a1·a2 + (d_out / a1)·(d_in·k·k / groups / a2).
    Raises:
        ValueError: on attaching, a1 or a2 does not divide a width.
    Source: Marjit et al., WACV 2025 (arXiv 2402.17412, 2024), section 3; a1 = 64, a2 = 8, initialization, learning rate and P
    from the authors' code (`krona.py`, three-dimensional branch; its two-dimensional branch multiplies incompatible shapes).
    """

    name: ClassVar[str] = "diffusekrona"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "smallest_file")
    paper: ClassVar[str] = (
        "Marjit et al., DiffuseKronA: A Parameter Efficient Fine-Tuning Method for Personalized Diffusion Models, WACV 2025"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    learning_rate: ClassVar[float] = 1e-3

    a1: int = 64
    a2: int = 8
    permuted: bool = True

    def __post_init__(self) -> None:
        if self.a1 < 1 or self.a2 < 1:
            option = "a1" if self.a1 < 1 else "a2"
            message = f"diffusekrona: a1 and a2 must be at least 1, got {self.a1} and {self.a2}"
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option))

    @classmethod
    def examples(cls) -> tuple[DiffuseKronA, DiffuseKronA]:
        """Factor shapes for small models, permuted as in the code and plain as in the paper."""
        return cls(a1=4, a2=2), cls(a1=2, a2=4, permuted=False)

    def build(self, site: WeightSite) -> DiffuseKronAAdapter:
        """A and B for one weight.

        Raises:
            ValueError: a1 does not divide d_out, or a2 does not divide d_in / groups.
        """
        for name, side, width in (("a1", self.a1, site.d_out), ("a2", self.a2, site.d_in // site.groups)):
            if width % side:
                fitting = tuple(n for n in range(1, min(width, 128) + 1) if width % n == 0)
                offer = ", ".join(map(str, fitting))
                message = f"{name}={side} does not divide {width}; use one of {offer}, or exclude the site"
                raise OptionError(message, option=name, method=self.name, given=side, expected=fitting)
        return DiffuseKronAAdapter(site, self.a1, self.a2, self.permuted)

    def count(self, site: WeightSite) -> int:
        """a1·a2 + b1·b2·k·k."""
        b1, b2 = site.d_out // self.a1, site.d_in // site.groups // self.a2
        return self.a1 * self.a2 + b1 * b2 * math.prod(site.kernel)
