"""ARC: a linear bottleneck before attention and MLP, with one symmetric projection for all blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.channels import Layout, add_channels_product, channels_product
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.adapter_calls import cast
from veneer.injection.sites import WeightSite

from .repadapter import is_padded

Init = Literal["xavier", "zero"]
ATTENTION = ("attn", "xattn")


def projection_key(site: WeightSite) -> str:
    """Key of the projection that a site shares with others: the first part of its role, and its width."""
    return f"{site.role.partition('.')[0]}_{site.d_in}"


class SharedProjections(nn.Module):
    """`U` (width, rank) for each kind of layer (`attn`, `mlp`, …) and each width among the sites, Xavier-uniform."""

    def __init__(self, sites: Sequence[WeightSite], rank: int) -> None:
        super().__init__()
        widths = {projection_key(site): site.d_in for site in sites}
        self.U = nn.ParameterDict({k: nn.init.xavier_uniform_(torch.empty(d, rank)) for k, d in widths.items()})


class ARCAdapter(Adapter):
    """x' = x + U diag(c) Uᵀ x, W' = W + (W U diag(c)) Uᵀ. `scale`: c (rank,); U is shared."""

    applies_strength: ClassVar[bool] = True
    shared: SharedProjections
    shift: nn.Parameter | None

    def __init__(self, site: WeightSite, rank: int, dropout: float) -> None:
        super().__init__()
        self.key, self.dropout = projection_key(site), dropout
        self.layout: Layout = "NLC" if site.kind == "linear" else "NCHW"
        self.scale = nn.Parameter(torch.zeros(rank))
        self.register_parameter("shift", None)

    def input(self, x: Tensor) -> Tensor:
        """x': dropout is on the features between both products, in training."""
        U = self.shared.U[self.key]
        low = channels_product(cast(x, self), U.mT * (self.scale * self.strength)[:, None], None, self.layout)
        low = F.dropout(low, self.dropout, self.training)
        shift = None if self.shift is None else self.shift * self.strength
        return add_channels_product(x, low, U, shift, self.layout)

    def weight(self, weight: Tensor) -> Tensor:
        """W + (W U diag(c)) Uᵀ."""
        U = self.shared.U[self.key]
        change = (weight.flatten(1).to(U.dtype) @ (U * (self.scale * self.strength))) @ U.mT
        return weight + change.view(weight.shape)


class ShiftedARCAdapter(ARCAdapter):
    """x' = x + U diag(c) Uᵀ x + t, with b' = b + W t. `shift`: t (width,)."""

    def __init__(self, site: WeightSite, rank: int, dropout: float) -> None:
        super().__init__(site, rank, dropout)
        self.shift = nn.Parameter(torch.zeros(site.d_in))

    def bias(self, bias: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """b + W t."""
        assert self.shift is not None
        return bias + weight().flatten(1).to(self.shift.dtype) @ (self.shift * self.strength)


@dataclass(frozen=True)
class ARC(Method):
    """x' = x + U Drop(diag(c) Uᵀ x) + t for the input x of a layer; U is shared by all blocks, c and t belong to one layer.

    U (width, rank) is one matrix for attention and another for the MLP, for each width in the model; it projects down and,
    transposed, up. Without dropout all is linear and merges: W' = W (I + U diag(c) Uᵀ), b' = b + W t. Initially t and, before
    attention, c are zero.

    Args:
        rank: columns of U, at least 1.
        dropout: probability of dropping one of the rank features in training, 0 to 1.
        init: initialization of c before the MLP: `xavier` (uniform), as the authors do, or `zero`, with which a new adapter
            leaves the output unchanged.
    Supports linear layers and 1×1 convolutions without groups and padding. If a weight is read and not called (open_clip's
    attention), or is a slice, W is modified in each forward pass; then there is no dropout, and no t if no bias follows.
    Counts: rank + width per site (rank without t), and width·rank for each U; ViT-B/16 96,432, before attention alone 48,216.
    Source: Dong et al., Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing, NeurIPS 2023, and the authors'
    code; U Xavier-uniform, c as a (1, rank) matrix. Deviations: if q, k and v are separate layers, each has c and t; other
    layers than those before attention and MLP may be selected, with c as before the MLP.
    """

    name: ClassVar[str] = "arc"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Dong et al., Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing, NeurIPS 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.{q,k,v}", "mlp.in_gate", "mlp.{in,gate}")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    shared_options: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 50
    dropout: float = 0.1
    init: Init = "xavier"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of(self.name, "rank", self.rank, "at least 1")
        if not 0 <= self.dropout < 1:
            raise OptionError.of(self.name, "dropout", self.dropout, "in [0, 1)")
        if self.init not in get_args(Init):
            raise OptionError.of(self.name, "init", self.init, f"one of {', '.join(get_args(Init))}")

    def changes_at_start(self, site: WeightSite) -> bool:
        """True where c is initialized to other values than zero: outside attention."""
        return self.init == "xavier" and site.role.partition(".")[0] not in ATTENTION

    def build_shared(self, sites: Sequence[WeightSite]) -> SharedProjections:
        """U of each kind and width."""
        return SharedProjections(sites, self.rank)

    def build(self, site: WeightSite) -> ARCAdapter:
        """c, and t where possible.

        Raises:
            ValueError: the convolution cannot merge a change of its input.
        """
        if site.kind == "conv" and (len(site.kernel) != 2 or site.groups > 1 or math.prod(site.kernel) > 1 or is_padded(site)):
            raise OptionError(
                f"a convolution of kernel {site.kernel}, {site.groups} groups and padding {site.padding} cannot merge a "
                "preceding projection. Select linear layers and 1×1 convolutions without groups and padding",
                option="where",
                method=self.name,
                given=(site.kernel, site.groups, site.padding),
            )
        adapter = (ShiftedARCAdapter if _is_shifted(site) else ARCAdapter)(site, self.rank, self.dropout)
        if self.changes_at_start(site):
            nn.init.xavier_uniform_(adapter.scale[None])
        return adapter

    def count(self, site: WeightSite) -> int:
        """rank + width, or rank."""
        return self.rank + (site.d_in if _is_shifted(site) else 0)


def _is_shifted(site: WeightSite) -> bool:
    """True if t can be added: to the input of a called layer, or to a bias after a weight."""
    return bool(site.bias or (site.called and site.rows is None))
