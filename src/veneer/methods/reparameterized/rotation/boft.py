"""BOFT: rotates the neurons of a frozen weight by a product of sparse orthogonal matrices, a butterfly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.functional.cayley import blocks_apply, cayley_change, skew
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite

from ._output_rotation import OutputRotation, reject_straddling_blocks


class BOFTAdapter(Adapter):
    """W' = W Rᵀ. Shapes: `skew` (m, d / b, b·(b − 1) / 2), the entries of each Q above its diagonal, the component with the
    smallest stride first; `magnitude` (d_out) or None.

    There is no output form: W (Rᵀ − I) x needs W.
    """

    applies_strength: ClassVar[bool] = True

    def __init__(self, d_out: int, m: int, blocks: int, size: int, rescale: bool) -> None:
        super().__init__()
        self.size = size
        self.skew = nn.Parameter(torch.zeros(m, blocks, size * (size - 1) // 2))
        self.magnitude = nn.Parameter(torch.ones(d_out)) if rescale else None

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·(D W Rᵀ − W): each component adds its change, which is exactly zero initially."""
        flat = weight.flatten(1)
        change = torch.zeros_like(flat)
        for step, rotation in enumerate(cayley_change(skew(self.skew, self.size))):
            change = change + blocks_apply(flat + change, rotation, spread=2**step)
        if self.magnitude is not None:
            change = (flat + change) * self.magnitude.unsqueeze(1) - flat
        return weight + (change * self.strength).reshape(weight.shape)


@dataclass(frozen=True)
class BOFT(Method):
    """W' = W Rᵀ, R = B_1 B_2 ⋯ B_m: all neurons (rows of W) are rotated alike, by m sparse orthogonal matrices.

    B_m is block-diagonal with orthogonal b × b blocks (I + Q)(I − Q)⁻¹, Q = −Qᵀ. In B_(m−i) the two halves of a block are
    2^i half-blocks apart, as the wings of a butterfly. m = 1 is OFT with blocks of b; from m = log2(2d/b) on, R is dense.

    Args:
        m: number of components, at least 1.
        b: block size, at least 2, even for m above 1. d = d_in must be a multiple of 2^(m−1)·b.
        rescale: also train D, a scale for each neuron: W' = D W Rᵀ, D initialized to 1 (peft always does).
        side: `output` rotates the layer's output, W' = D R W and d = d_out, as LyCORIS does. A convolution's channels are
            rotated, and the bias is unchanged.
    Q is initialized to zero. The Cayley transform is computed exactly, in float32 or better, not by a truncated series.
    Convolutions: a neuron is its kernel, d = d_in·k·k / groups. Grouped and depthwise: also one R for all neurons.
    On the input side it has only the weight form, so a quantized base is rejected.
    Counts: m·d·(b − 1)/2, d_out more with `rescale`.
    Raises:
        ValueError: on attaching, d is not a multiple of 2^(m−1)·b.
    Source: Liu et al., ICLR 2024, section 4 (BOFT(m, b) is built from R(m, b/2)); m = 2, b = 8 and the learning rate from its
    Llama-2 experiments. Deviations: Q is parametrized by its free entries, as the paper counts them; no multiplicative dropout.
    """

    name: ClassVar[str] = "boft"
    uses: ClassVar[tuple[str, ...]] = ("few_photos",)
    paper: ClassVar[str] = "Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, ICLR 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    learning_rate: ClassVar[float] = 1e-4

    m: int = 2
    b: int = 8
    rescale: bool = False
    side: Literal["input", "output"] = "input"

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            raise OptionError.of("boft", "side", self.side, "'input' or 'output'")
        if self.m < 1:
            raise OptionError.of("boft", "m", self.m, "at least 1")
        if self.b < 2 or (self.m > 1 and self.b % 2):
            message = f"boft: b must be at least 2, and even if m is above 1; got b={self.b} with m={self.m}"
            raise OptionError(message, option="b", method=self.name, given=self.b)

    @classmethod
    def examples(cls) -> tuple[BOFT, BOFT]:
        """Block sizes for small models, without and with rescaling."""
        return cls(b=4), cls(m=3, b=2, rescale=True)

    def blocks(self, site: WeightSite) -> int:
        """d / b at one weight.

        Raises:
            ValueError: the neurons' dimension is not a multiple of 2^(m−1)·b.
        """
        width = site.d_out if self.side == "output" else site.d_in // site.groups * math.prod(site.kernel)
        if width % (2 ** (self.m - 1) * self.b):
            span = 2 ** (self.m - 1) * self.b
            raise OptionError(
                f"neurons of dimension {width} are not a multiple of 2^(m−1)·b = {span}; set a smaller m or b, or exclude the "
                "site",
                option="m",
                method=self.name,
                given=span,
                expected=width,
            )
        return width // self.b

    def build(self, site: WeightSite) -> Adapter:
        """Q of zeros for one weight."""
        if self.side == "output":
            reject_straddling_blocks(site, 2 ** (self.m - 1) * self.b)
            return OutputRotation(site, [self.m, self.blocks(site)], self.b, None, self.rescale)
        return BOFTAdapter(site.d_out, self.m, self.blocks(site), self.b, self.rescale)

    def count(self, site: WeightSite) -> int:
        """m·d·(b − 1)/2, and the scales of the neurons."""
        return self.m * self.blocks(site) * self.b * (self.b - 1) // 2 + (site.d_out if self.rescale else 0)
