"""OFT: rotates the neurons of a frozen weight by an orthogonal matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.functional.cayley import blocks_apply, cayley_change, clip_norm, neumann_change, rotate_features, skew
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._state_transfer import rotation_state

from ._output_rotation import OutputRotation, reject_straddling_blocks


class OFTAdapter(Adapter):
    """W' = D W Rᵀ. Shapes: `skew` (blocks, b·(b − 1) / 2), the entries of each Q above its diagonal; `magnitude` D (d_out)."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, d_out: int, blocks: int, size: int, radius: float | None, rescale: bool, terms: int | None = None) -> None:
        super().__init__()
        self.size, self.radius, self.terms = size, radius, terms
        self.skew = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))
        self.magnitude = nn.Parameter(torch.ones(d_out)) if rescale else None

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·(D W Rᵀ − W), computed from R − I, which is exactly zero initially."""
        flat = weight.flatten(1)
        change = blocks_apply(flat, self.rotation())
        if self.magnitude is not None:
            change = (flat + change) * self.magnitude.unsqueeze(1) - flat
        return weight + (change * self.strength).reshape(weight.shape)

    def state_from(self, other: OFTAdapter | None) -> dict[str, Tensor]:
        """State with which this rotates as `other` does, or not at all. `ValueError` if its blocks do not match these."""
        return rotation_state(self, other)

    def rotation(self) -> Tensor:
        """R_i − I, (blocks, b, b)."""
        q = skew(self.skew, self.size)
        q = q if self.radius is None else clip_norm(q, self.radius)
        return cayley_change(q) if self.terms is None else neumann_change(q, self.terms)


class InputRotation(OFTAdapter):
    """W' x = W (Rᵀ x) at a linear layer that is called: rotates its input, at the cost of the blocks instead of W."""

    def input(self, x: Tensor) -> Tensor:
        """x + s·(Rᵀ x − x), x (…, d_in)."""
        return rotate_features(x, self.rotation() * self.strength)


@dataclass(frozen=True)
class OFT(Method):
    """W' = W Rᵀ with R = diag(R_1, …, R_r) orthogonal: all neurons (rows of W) are rotated alike, keeping their angles and norms.

    R_i = (I + Q_i)(I − Q_i)⁻¹ with Q_i = −Q_iᵀ. R acts on the d = d_in weights of a neuron, on the input side: W' x = W (Rᵀ x).

    Args:
        blocks: r, number of blocks of R; must divide d. Fewer blocks train more parameters: d²/(2r). At least 1.
        block_size: b, size of the blocks, instead of `blocks`; must divide d. At least 2.
        share: one block in all r positions.
        coft: ε of the constrained form: each Q_i is kept within the Frobenius norm ε·b²/√r, with `share` ε·b² (the authors'
            scaling; they use 6e-5). Above 0 (default: no constraint).
        rescale: also train D, a scale for each neuron: W' = D W Rᵀ, D initialized to 1.
        side: `output` rotates the layer's output, W' = D R W and d = d_out, as LyCORIS and kohya's tools do; such blocks may
            have size 1 with `rescale`. A convolution's channels are rotated, and the bias is unchanged. LyCORIS itself loads a
            file only if the block size is at most the number of blocks.
        neumann_terms: number of terms of the Neumann series that approximates R_i, as in peft, whose default is 5:
            I + 2 Q + 2 Q² + … + Qⁿ with n = neumann_terms − 1. R is then only approximately orthogonal: the error grows with ‖Q‖.
            None computes the inverse exactly. At least 1; only with side='input'.
    Q is initialized to zero. Without `neumann_terms` the Cayley transform is exact, in float32 or better.
    Convolutions: a neuron is its kernel, d = d_in·k·k / groups, channel by channel; with as many blocks as input channels, each
    channel's window is rotated separately. Grouped and depthwise: also one R for all neurons.
    On the input side, linear layers without `rescale` rotate their input. Otherwise, and at slices of a fused weight, W itself is
    rotated in each forward pass, so a quantized base is rejected.
    Counts: r·b·(b − 1)/2 with b = d/r; b·(b − 1)/2 with `share`; d_out more with `rescale`. 128 × 128 in 8 blocks: 960.
    Raises:
        ValueError: on attaching, d is not a multiple of the number or the size of the blocks.
    Source: Qiu et al., NeurIPS 2023, section 3 (D as in its erratum). Deviations: Q
    is parametrized by its free entries, where the authors' code trains a full matrix and takes its skew-symmetric part; COFT
    scales Q in the forward pass, with gradient, where theirs projects the parameter at each step: the reachable R are the same.
    """

    name: ClassVar[str] = "oft"
    uses: ClassVar[tuple[str, ...]] = ("few_photos",)
    paper: ClassVar[str] = "Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, NeurIPS 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    learning_rate: ClassVar[float] = 6e-5

    blocks: int = 4
    block_size: int | None = None
    share: bool = False
    coft: float | None = None
    rescale: bool = False
    side: Literal["input", "output"] = "input"
    neumann_terms: int | None = None

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            raise OptionError.of("oft", "side", self.side, "'input' or 'output'")
        if self.blocks < 1:
            raise OptionError.of("oft", "blocks", self.blocks, "at least 1")
        if self.block_size is not None and self.block_size < self._least:
            raise OptionError.of("oft", "block_size", self.block_size, "at least 2, because a block of 1 cannot rotate")
        if self.coft is not None and self.coft <= 0:
            raise OptionError.of("oft", "coft", self.coft, "above 0, or None for no constraint")
        if self.neumann_terms is not None and (self.neumann_terms < 1 or self.side == "output"):
            raise OptionError(
                "oft: neumann_terms must be at least 1 and needs side='input', or None for the exact transform; got "
                f"{self.neumann_terms} with side={self.side!r}",
                option="neumann_terms",
                method=self.name,
                given=(self.neumann_terms, self.side),
            )

    @classmethod
    def examples(cls) -> tuple[OFT, OFT]:
        """The plain form; and the shared, constrained and rescaled one."""
        return cls(), cls(block_size=2, share=True, coft=0.1, rescale=True)

    def shape(self, site: WeightSite) -> tuple[int, int]:
        """(r, b) at one weight.

        Raises:
            ValueError: they do not divide the neurons' dimension.
        """
        width = site.d_out if self.side == "output" else site.d_in // site.groups * math.prod(site.kernel)
        r = self.blocks if self.block_size is None else width // self.block_size
        if r == 0 or width % r or width // r < self._least or (self.block_size is not None and width % self.block_size):
            request = f"{self.blocks} blocks" if self.block_size is None else f"blocks of {self.block_size}"
            fitting = tuple(b for b in range(2, min(width, 128) + 1) if width % b == 0)
            raise OptionError(
                f"neurons of dimension {width} cannot be split into {request} of at least 2; "
                f"set block_size to one of {', '.join(map(str, fitting)) or 'none'}, or exclude the site",
                option="blocks" if self.block_size is None else "block_size",
                method=self.name,
                where=f"{width}",
                given=self.block_size or self.blocks,
                expected=fitting,
            )
        return r, width // r

    @property
    def _least(self) -> int:
        """The smallest block size: a block of 1 cannot rotate, but on the output side it can rescale."""
        return 1 if self.side == "output" and self.rescale else 2

    def build(self, site: WeightSite) -> Adapter:
        """Q of zeros for one weight."""
        r, b = self.shape(site)
        radius = None if self.coft is None else self.coft * b * b / math.sqrt(1 if self.share else r)
        if self.side == "output":
            reject_straddling_blocks(site, b)
            return OutputRotation(site, [1 if self.share else r], b, radius, self.rescale)
        kind = InputRotation if site.kind == "linear" and not self.rescale else OFTAdapter
        return kind(site.d_out, 1 if self.share else r, b, radius, self.rescale, self.neumann_terms)

    def count(self, site: WeightSite) -> int:
        """r·b·(b − 1)/2, or one block's, and the scales of the neurons."""
        r, b = self.shape(site)
        return (1 if self.share else r) * b * (b - 1) // 2 + (site.d_out if self.rescale else 0)
