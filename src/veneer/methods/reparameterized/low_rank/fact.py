"""FacT: the weight updates of all layers as one tensor, decomposed into few factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.convolve import convolve
from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


def tiles(site: WeightSite) -> tuple[int, int, int, int]:
    """Tiling of a weight: (tiles along the output, along the input, outputs of a tile, inputs of a tile).

    Squares of the shorter side if it divides the longer, so that (4d, d) is four of (d, d); else one tile.
    """
    if site.d_out % site.d_in == 0:
        return site.d_out // site.d_in, 1, site.d_in, site.d_in
    if site.d_in % site.d_out == 0:
        return 1, site.d_in // site.d_out, site.d_out, site.d_out
    return 1, 1, site.d_out, site.d_in


def matrices(site: WeightSite) -> int:
    """Number of matrices that a weight is divided into: its tiles, for each position of a kernel."""
    n_out, n_in, _, _ = tiles(site)
    return n_out * n_in * math.prod(site.kernel)


class SharedFactors(nn.Module):
    """`U` (rank, d) for every width d of a tile's inputs, `V` (d, rank) of its outputs; for the Tucker form `C`, rank³.

    `matrices`: total over all sites.
    """

    def __init__(self, sites: Sequence[WeightSite], rank: int, tucker: bool) -> None:
        super().__init__()
        d_out, d_in = (sorted({tiles(site)[i] for site in sites}) for i in (2, 3))
        self.U = nn.ParameterDict({str(d): nn.init.kaiming_uniform_(torch.empty(rank, d), a=math.sqrt(5)) for d in d_in})
        self.V = nn.ParameterDict({str(d): torch.zeros(d, rank) for d in d_out})
        self.C = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank))) if tucker else None
        self.matrices = sum(matrices(site) for site in sites)


class FacTAdapter(Adapter):
    """ΔW_j = s·V Σ_j U for each tile j of the weight, and each position of a kernel.

    Shapes: `sigma` (tiles out·rank, tiles in·rank, *kernel), or in the Tucker form `P` (rank, tiles·k·k), with Σ_j =
    Σ_n P[n, j] C[:, :, n].
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    shared: SharedFactors

    def __init__(self, site: WeightSite, rank: int, tucker: bool, scale: float, dropout: float) -> None:
        super().__init__()
        self.site, self.rank, self.scale, self.dropout = site, rank, scale, dropout
        self.n_out, self.n_in, self.width_out, self.width_in = tiles(site)
        if tucker:
            self.P = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, matrices(site))))
        else:
            self.sigma = nn.Parameter(torch.empty(self.n_out * rank, self.n_in * rank, *site.kernel))
            nn.init.kaiming_uniform_(self.sigma, a=math.sqrt(5))

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Rescales the initial P to the Xavier bound of a (rank, matrices of all sites) matrix, of which it is a part."""
        if self.shared.C is not None and not is_init_deferred():
            rank, own = self.P.shape
            self.P.mul_(math.sqrt((rank + own) / (rank + self.shared.matrices)))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the module's input; y: its output. Dropout, in training, is between Σ and V."""
        site, U, V = self.site, self.U, self.V
        core = self.core() * (self.strength * self.scale)
        if site.kind == "linear":
            low = F.linear(x.unflatten(-1, (self.n_in, -1)), U).flatten(-2)
            low = F.dropout(F.linear(low, core), self.dropout, self.training)
            return y + F.linear(low.unflatten(-1, (self.n_out, -1)), V).flatten(-2)
        ones = (1,) * len(site.kernel)
        low = convolve(x, U.repeat(self.n_in, 1).view(-1, self.width_in, *ones), groups=self.n_in)
        low = F.dropout(convolve(low, core, site.stride, site.padding, site.dilation), self.dropout, self.training)
        return y + convolve(low, V.repeat(self.n_out, 1).view(-1, self.rank, *ones), groups=self.n_out)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·V Σ U, tile by tile."""
        core = self.core().reshape(self.n_out, self.rank, self.n_in, self.rank, -1)
        change = torch.einsum("or,arbqk,qi->aobik", self.V, core, self.U).reshape(self.site.weight_shape)
        return weight + change * (self.strength * self.scale)

    def core(self) -> Tensor:
        """Every Σ_j, (tiles out·rank, tiles in·rank, *kernel)."""
        if self.shared.C is None:
            return self.sigma
        sigma = (self.shared.C @ self.P).unflatten(-1, (self.n_out, self.n_in, -1))
        return sigma.permute(2, 0, 3, 1, 4).reshape(self.n_out * self.rank, self.n_in * self.rank, *self.site.kernel)

    @property
    def U(self) -> Tensor:  # noqa: N802
        """The shared factor for this input width."""
        found: Tensor = self.shared.U[str(self.width_in)]
        return found

    @property
    def V(self) -> Tensor:  # noqa: N802
        """The shared factor for this output width."""
        found: Tensor = self.shared.V[str(self.width_out)]
        return found


@dataclass(frozen=True)
class FacT(Method):
    """ΔW_j = s·V Σ_j U for the j-th d × d matrix of the model: U and V shared by all layers; V initialized to zero.

    Args:
        form: `tt` (tensor train, every Σ_j trained) or `tk` (Tucker, Σ_j = Σ_n P[n, j] C[:, :, n], C shared).
        rank: r, at least 1; the paper uses up to 16 for `tt`, up to 32 for `tk`.
        scale: s; the paper selects it per task from 0.01 to 100.
        dropout: probability of dropping a feature between Σ and V in training, 0 to 1.
    A (4d, d) or (d, 4d) weight is four matrices. Beyond the paper: widths may differ, and each gets its own U and V (d_in × d_out
    without a common divisor is one matrix with U of d_in and V of d_out); each position of a convolution's kernel is a matrix.
    Counts: per site rank² (`tt`) or rank (`tk`) for each d × d matrix; shared 2·d·rank for each width, and rank³ (`tk`).
    ViT-B/16: `tt` of rank 16 61,440, `tk` of rank 32 86,528.
    Source: Jie and Deng, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023 (FacT-TT and FacT-TK);
    initialization and dropout as in their code: P of all sites is one Xavier-uniform (rank, matrices) matrix.
    Deviation: `tk` is the paper's form. Their code reshapes the four cores of an MLP weight without a permutation, so that each
    of its tiles mixes entries of all four, and contracts C the other way round in fc2: their published TK results use another
    parametrization of the MLP, with the same number of parameters.
    """

    name: ClassVar[str] = "fact"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Jie and Deng, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("rank", "form")

    form: Literal["tt", "tk"] = "tt"
    rank: int = 16
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.form not in ("tt", "tk"):
            raise OptionError.of("fact", "form", self.form, "'tt' or 'tk'")
        if self.rank < 1:
            raise OptionError.of("fact", "rank", self.rank, "at least 1")
        if not 0 <= self.dropout < 1:
            raise OptionError.of("fact", "dropout", self.dropout, "in [0, 1)")

    @classmethod
    def examples(cls) -> tuple[FacT, FacT]:
        """Both forms."""
        return cls(), cls(form="tk", rank=8)

    def build_shared(self, sites: Sequence[WeightSite]) -> SharedFactors:
        """U, V and C."""
        return SharedFactors(sites, self.rank, self.form == "tk")

    def build(self, site: WeightSite) -> FacTAdapter:
        """The Σ of one weight.

        Raises:
            ValueError: a grouped convolution, whose groups share no input.
        """
        if site.groups > 1:
            message = f"a convolution with {site.groups} groups has no common input to factorize; select other sites"
            raise OptionError(message, option="where", method=self.name, given=site.groups, expected=1)
        return FacTAdapter(site, self.rank, self.form == "tk", self.scale, self.dropout)

    def count(self, site: WeightSite) -> int:
        """rank² or rank for each matrix."""
        return matrices(site) * (self.rank if self.form == "tk" else self.rank**2)
