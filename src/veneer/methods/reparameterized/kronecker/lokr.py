"""LoKr: a Kronecker product of a small and a large factor, added to a frozen weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve, match_memory_format
from veneer.functional.kronecker import add_kron, kron_apply, kron_factors, kron_weight, mix
from veneer.functional.low_rank_autograd import add_product, project
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._state_transfer import lokr_state
from veneer.methods.reparameterized._weight_decomposition import AXES, DecomposedAdapter, NormAxis, magnitude_count

Low = Literal["left", "right", "both", "none"]


@dataclass(frozen=True)
class Split:
    """Factorization of a weight: C is (up, uq), D (vp, vq, *kernel); the rank of a full factor is None."""

    up: int
    vp: int
    uq: int
    vq: int
    size: int
    left_rank: int | None
    right_rank: int | None


class LoKrFactors(Adapter):
    """ΔW = C ⊗ D.

    Shapes: `left` C (up, uq) and `right` D (vp, vq, *kernel) with d_out = up·vp and d_in / groups = uq·vq. A factored one is
    `left_up` (up, rank) times `left_down` (rank, uq), or `right_up` (vp, rank) times `right_down` (rank, vq, *kernel).
    """

    applies_strength: ClassVar[bool] = True
    left: nn.Parameter | None
    left_up: nn.Parameter
    left_down: nn.Parameter
    right: nn.Parameter | None
    right_up: nn.Parameter
    right_down: nn.Parameter

    def __init__(self, site: WeightSite, split: Split, scaling: float) -> None:
        super().__init__()
        self.site, self.split, self.scaling = site, split, scaling
        self._put("left", split.up, (split.uq,), split.left_rank)
        self._put("right", split.vp, (split.vq, *site.kernel), split.right_rank)
        nn.init.zeros_(self.right_down if self.right is None else self.right)

    def _put(self, name: str, rows: int, inner: tuple[int, ...], rank: int | None) -> None:
        """Registers a full factor, or its two low-rank factors, initialized Kaiming-uniformly with a = √5."""
        shapes = {name: (rows, *inner)} if rank is None else {f"{name}_up": (rows, rank), f"{name}_down": (rank, *inner)}
        self.register_parameter(name, None)
        for key, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape))
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            self.register_parameter(key, parameter)

    def state_from(self, other: LoKrFactors | None) -> dict[str, Tensor]:
        """State with which this makes the update of `other`, or none: its C and D. `ValueError` if they exceed these."""
        return lokr_state(self, other)

    def delta(self) -> Tensor:
        """C ⊗ D in the weight's shape, without scales."""
        right = self.right
        if right is None:
            right = (self.right_up @ self.right_down.flatten(1)).unflatten(1, self.right_down.shape[1:])
        return kron_weight(self._left(), right)

    def _left(self) -> Tensor:
        return self.left_up @ self.left_down if self.left is None else self.left


class LoKrAdapter(LoKrFactors):
    """y' = y + s·(C ⊗ D) x, W' = W + s·(C ⊗ D)."""

    adds: ClassVar[bool] = True
    overwrites: ClassVar[bool] = True
    norm_axis: ClassVar[None] = None

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y + s·ΔW x. Applies C and D in sequence; materializes ΔW only for grouped convolutions.

        Args:
            x: input of the module. `y`: its output. `overwrite`: y is modified in place.
        """
        site, split, scale = self.site, self.split, self.strength * self.scaling
        if site.groups > 1:
            return y + convolve(x, self.delta() * scale, site.stride, site.padding, site.dilation, site.groups)
        left = self._left() * scale
        if self.right is not None and split.up > split.uq:
            return y + kron_apply(x, left, partial(self._right, self.right), len(site.kernel))
        rows = x.reshape(-1, split.vq, *(x.shape[2:] if site.kernel else ()))
        blocks = y.reshape(-1, split.vp, *(y.shape[2:] if site.kernel else ()))
        if self.right is None:  # A, C, B: mixes only the output of A, and B's products have y's memory layout
            added = add_product(blocks, self._mixed(self._right_low(rows), left), self._right_up, overwrite)
        elif site.kernel:  # C first: it does not enlarge x
            added = blocks + self._right(self.right, self._mixed(rows, left))
        else:
            added = add_kron(blocks, rows, left, self.right, overwrite)
        return match_memory_format(added.reshape(y.shape), y)

    def _mixed(self, x: Tensor, left: Tensor) -> Tensor:
        """C on the blocks of x (n·uq, …): (n·up, …)."""
        return mix(x.reshape(-1, self.split.uq, math.prod(x.shape[1:])), left).reshape(-1, *x.shape[1:])

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·(C ⊗ D)."""
        return weight + self.delta() * (self.strength * self.scaling)

    def _right(self, right: Tensor, x: Tensor) -> Tensor:
        """D x, for a full D."""
        return convolve(x, right, self.site.stride, self.site.padding, self.site.dilation)

    def _right_low(self, x: Tensor) -> Tensor:
        if self.site.kernel:
            return convolve(x, self.right_down, self.site.stride, self.site.padding, self.site.dilation)
        return project(x, self.right_down)

    @property
    def _right_up(self) -> Tensor:
        return self.right_up.reshape(*self.right_up.shape, *(1,) * len(self.site.kernel))


class DecomposedLoKr(LoKrFactors, DecomposedAdapter):
    """W' = m·(W + s·(C ⊗ D)) / ‖W + s·(C ⊗ D)‖."""

    def __init__(self, site: WeightSite, split: Split, scaling: float, axis: NormAxis) -> None:
        super().__init__(site, split, scaling)
        self.decompose(axis)


@dataclass(frozen=True)
class LoKr(Method):
    """W' = W + s·(C ⊗ D), with D full or D = B A of rank `rank`; s = alpha / rank if a factor is of low rank, else 1.

    Args:
        factor: size of C: d_out and d_in are each split into `factor` and the rest if it divides them, else at the largest
            divisor up to it; the smaller part is C's. At least 1; low values train more parameters. -1: as square as possible.
        rank: rank of D, at least 1 (default: D is full). D is also full if the rank is at least half of its larger dimension,
            without the kernel.
        alpha: numerator of the scale (default: the rank, so that s = 1). Ignored if both factors are full.
        decompose_both: C is also of that rank, if the rank is less than half of C's larger dimension.
        sides: C's dimensions (rows, columns), instead of `factor`; they must divide d_out and d_in / groups.
        low: which factors are of rank `rank`, regardless of their size: `left` (C), `right` (D), `both` or `none` (default: by
            the rules above). For files, whose splits may follow other rules.
        norm_axis: weight-decomposed form (DoRA around LoKr), W' = m·(W + s·(C ⊗ D)) / ‖W + s·(C ⊗ D)‖ with trained m: the norm
            per `output` or per `input` channel, as in `dora` (default: the plain form). W' is then computed in each forward
            pass.
    D (or A) is initialized to zero; the others Kaiming-uniformly (a = sqrt 5).
    Convolutions: D has the kernel, and d_in means d_in / groups. For grouped convolutions `output` computes C ⊗ D; otherwise
    nothing larger than C and D is materialized: (C ⊗ D) x = C X Dᵀ.
    Counts: up·uq + vp·vq·k·k, a low-rank factor replacing its term by rank·(up + uq) or rank·(vp + vq·k·k), where d_out = up·vp,
    d_in / groups = uq·vq; with `norm_axis` d_out or d_in / groups more.
    Source: Yeh et al. (LyCORIS), ICLR 2024; defaults from its experiments. Where paper and library differ
    this follows the library: a `factor` above the square root that divides a width is used (128 by 64 is 2·64). Deviation: no
    Tucker form of D.
    """

    name: ClassVar[str] = "lokr"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "style")
    paper: ClassVar[str] = (
        "Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, ICLR 2024"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 5e-4

    factor: int = 8
    rank: int | None = None
    alpha: float | None = None
    decompose_both: bool = False
    sides: tuple[int, int] | None = None
    low: Low | None = None
    norm_axis: NormAxis | None = None

    def __post_init__(self) -> None:
        if self.sides is not None and (len(self.sides) != 2 or min(self.sides) < 1):
            raise OptionError.of("lokr", "sides", self.sides, "two integers of at least 1, or None for a factor")
        if self.low is not None and self.low not in get_args(Low):
            raise OptionError.of("lokr", "low", self.low, f"one of {', '.join(get_args(Low))}, or None for the rules")
        if self.norm_axis not in (None, *AXES):
            raise OptionError.of("lokr", "norm_axis", self.norm_axis, f"one of {', '.join(AXES)}, or None")
        if self.rank is None and self.low not in (None, "none"):
            message = f"lokr: low={self.low!r} needs a rank; set rank=…, or leave low out"
            raise OptionError(message, option="low", method=self.name, given=self.low, expected="rank")
        if self.factor < 1 and self.factor != -1:
            raise OptionError.of("lokr", "factor", self.factor, "-1 or at least 1")
        if self.rank is not None and self.rank < 1:
            raise OptionError.of("lokr", "rank", self.rank, "at least 1, or None for a full factor")
        if self.rank is None and (self.alpha is not None or self.decompose_both):
            option = "decompose_both" if self.alpha is None else "alpha"
            message = "lokr: alpha and decompose_both need a rank; set rank=…, or leave both out"
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option), expected="rank")

    @classmethod
    def examples(cls) -> tuple[LoKr, LoKr]:
        """Full factors, and all of low rank."""
        return cls(), cls(factor=-1, rank=1, alpha=2.0, decompose_both=True)

    def split(self, site: WeightSite) -> Split:
        """The factors' dimensions and ranks at one weight.

        Raises:
            ValueError: `sides` do not divide the weight's dimensions.
        """
        (up, vp), (uq, vq) = self._sides(site)
        left = self.rank if self.decompose_both and self.rank is not None and self.rank < max(up, uq) / 2 else None
        right = self.rank if self.rank is not None and self.rank < max(vp, vq) / 2 else None
        if self.low is not None:
            left, right = (self.rank if self.low in (side, "both") else None for side in ("left", "right"))
        return Split(up, vp, uq, vq, math.prod(site.kernel), left, right)

    def _sides(self, site: WeightSite) -> tuple[tuple[int, int], tuple[int, int]]:
        """(up, vp) and (uq, vq)."""
        d_out, d_in = site.d_out, site.d_in // site.groups
        if self.sides is None:
            return kron_factors(d_out, self.factor), kron_factors(d_in, self.factor)
        up, uq = self.sides
        if d_out % up or d_in % uq:
            message = f"sides={self.sides} do not divide {d_out} outputs and {d_in} inputs; choose divisors, or a factor"
            raise OptionError(message, option="sides", method=self.name, given=self.sides, expected=(d_out, d_in))
        return (up, d_out // up), (uq, d_in // uq)

    def build(self, site: WeightSite) -> LoKrFactors:
        """C and D for one weight."""
        split = self.split(site)
        full = split.left_rank is None and split.right_rank is None
        scaling = 1.0 if full or self.alpha is None or self.rank is None else self.alpha / self.rank
        if self.norm_axis is not None:
            return DecomposedLoKr(site, split, scaling, self.norm_axis)
        return LoKrAdapter(site, split, scaling)

    def count(self, site: WeightSite) -> int:
        """Number of parameters in C and D."""
        s = self.split(site)
        left = s.up * s.uq if s.left_rank is None else s.left_rank * (s.up + s.uq)
        right = s.vp * s.vq * s.size if s.right_rank is None else s.right_rank * (s.vp + s.vq * s.size)
        return left + right + (0 if self.norm_axis is None else magnitude_count(site, self.norm_axis))
