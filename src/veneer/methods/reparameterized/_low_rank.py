"""LoRA's adapters: the plain pair, the pair that begins as a part of the weight, and the pair with a core between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.convolve import convolve
from veneer.functional.low_rank_init import orthonormal, principal
from veneer.functional.low_rank_product import add_product, project
from veneer.injection.attachment.deferred_init import values_follow, zeros
from veneer.injection.errors import UnsupportedSite
from veneer.injection.method import Adapter
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import WeightSite

from ._swapping import lora_state, lora_together

Init = Literal["kaiming", "gaussian", "pissa", "olora"]


def pairs_in(site: WeightSite, rank: int) -> int:
    """How many pairs a convolution has: one a group where the groups divide the rank, else one on its flattened kernels."""
    return 1 if rank % site.groups else site.groups


class LoRAAdapter(Adapter):
    """y' = y + s·B(A x), W' = W + s·B A. Shapes: `down` (rank, d_in / groups[, k, k]), `up` (d_out, rank / pairs[, 1, 1]).

    `pairs` is the number of groups, each with its part of A and B, or 1 where they do not divide the rank: then all groups have
    the same A, and B A is a product of (d_out, rank) and (rank, d_in·k·k / groups) as a linear layer's is.
    An embedding keeps `down` as (d_in, rank), rows looked up by id, and `up` as (d_out, rank).
    """

    adds: ClassVar[bool] = True
    blends: ClassVar[bool] = True
    overwrites: ClassVar[bool] = True

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.site, self.scaling, self.dropout = site, scaling, dropout
        self.pairs = pairs_in(site, rank)
        if site.kind == "embedding":
            self.down = nn.Parameter(torch.empty(site.d_in, rank))
            self.up = nn.Parameter(zeros(site.d_out, rank))
        else:
            ones = (1,) * len(site.kernel)
            self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
            self.up = nn.Parameter(zeros(site.d_out, rank // self.pairs, *ones))

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y + B (s·A x): scaled between the two, where there are only `rank` features.

        Args:
            x: input of the module. `y`: its output. `overwrite`: y is modified in place.
        """
        if self.dropout and self.site.kind != "embedding":
            x = F.dropout(x, self.dropout, self.training)
        if self.pairs != self.site.groups:
            return y + self._dense(x, self.delta() * (self.strength * self.scaling))
        low = self._low(x, self.down) * (self.strength * self.scaling)
        if self.site.groups == 1:
            return add_product(y, low, self.up, overwrite)
        return y + convolve(low, self.up, groups=self.site.groups)

    def _low(self, x: Tensor, down: Tensor) -> Tensor:
        """A x."""
        site = self.site
        if site.kind == "embedding":
            return F.embedding(x, down)
        if site.kind == "linear":
            return project(x, down)
        return convolve(x, down, site.stride, site.padding, site.dilation, site.groups)

    def _dense(self, x: Tensor, change: Tensor) -> Tensor:
        """ΔW x: A x for all groups would be groups·rank features, of which there are often more than of y."""
        site = self.site
        return convolve(x, change, site.stride, site.padding, site.dilation, site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·B A, in W's shape."""
        return weight + self.delta() * (self.strength * self.scaling)

    def taking(self, other: LoRAAdapter | None) -> dict[str, Tensor]:
        """State with which this makes the change of `other`, or none. `ValueError` where its pair finds no room in this one's."""
        return lora_state(self, other)

    @staticmethod
    def together(each: Sequence[tuple[LoRAAdapter, float] | None], x: Tensor, y: Tensor, over: bool) -> Tensor | None:
        """`output` for a batch whose n samples have an adapter and a strength each, or None; rows i, i + n, … are sample i's.

        None for other layers than linear ones, and while dropout acts. `over`: y may be written over.
        """
        return lora_together(each, x, y, over)

    def delta(self) -> Tensor:
        """B A in the weight's shape, without any scale."""
        return self._product(*self.own_pair())

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        site = self.site
        if site.kind == "embedding":
            return down @ up.T
        if self.pairs == 1:
            return (up.flatten(1) @ down.flatten(1)).reshape(site.weight_shape)
        pairs = [t.flatten(1).unflatten(0, (site.groups, -1)) for t in (up, down)]
        return torch.bmm(*pairs).reshape(site.weight_shape)

    def own_pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the same change as an ordinary LoRA with this scale and as many `pairs`."""
        return self.down, self.up

    def pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the same change as an ordinary LoRA with this scale and a pair a group, for what can hold nothing else.

        Where groups have one A, each gets a copy: rank groups·rank.
        """
        down, up = self.own_pair()
        return (down if self.pairs == self.site.groups else torch.cat([down] * self.site.groups)), up

    def factors(self) -> tuple[Tensor, Tensor]:
        """C (groups, d_out / groups, rank) and D (groups, rank, width), s in C: W' = W + C D with W flattened group by group.

        An embedding is one group, whose outputs are its rows.
        """
        down, up = self.pair()
        if self.site.kind == "embedding":
            left, right = down[None], up.T[None]
        else:
            left, right = (t.flatten(1).unflatten(0, (self.site.groups, -1)) for t in (up, down))
        return left * (self.strength * self.scaling), right


class PartAdapter(LoRAAdapter):
    """y' = y + s·(B A x − B0 A0 x), W' = W + s·(B A − B0 A0), where A and B begin as A0 and B0, a part of W.

    This is W0 = W − s·B0 A0 with an ordinary LoRA on it, and the same training, on a base that never changes. `down0`, `up0`
    are A0 and B0; they are saved, since a decomposition is not unique. Until `enter` they and B are zero.
    """

    down0: Tensor
    up0: Tensor

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float, init: Init, niter: int) -> None:
        super().__init__(site, rank, scaling, dropout)
        self.init, self.niter = init, niter
        for name in ("down", "up"):
            self.register_buffer(f"{name}0", torch.zeros(getattr(self, name).shape))

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Begin as a part of the host's own weight, in single precision or better; of each group's, where there are groups."""
        site, weight = self.site, base_tensor(tower, self.site.path, self.site.param)
        if not weight.is_floating_point():
            raise UnsupportedSite(
                f"lora: {site.name}: init={self.init!r} decomposes the weight, and this one is quantised. Load the base "
                "unquantised, or use init='kaiming'.",
                site=site.name,
                method="lora",
                option="init",
                given=weight.dtype,
            )
        if values_follow() or weight.is_meta:
            return
        rows = weight[slice(*(site.rows or (None,)))].to(self.up.dtype)
        matrix = rows.T[None] if site.kind == "embedding" else rows.flatten(1).unflatten(0, (self.pairs, -1))
        rank = self.up.shape[1]
        down, up = principal(matrix, rank, self.scaling, self.niter) if self.init == "pissa" else orthonormal(matrix, rank)
        for part, found in ((self.down, down.mT if site.kind == "embedding" else down), (self.up, up)):
            part.copy_(found.reshape(part.shape))
        self.down0.copy_(self.down)
        self.up0.copy_(self.up)

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """Bitwise y where A and B are as they began. Dropout is before A only, as A0 belongs to the weight."""
        start = self._change(x, self.down0, self.up0)
        if self.dropout and self.site.kind != "embedding":
            x = F.dropout(x, self.dropout, self.training)
        return y + (self._change(x, self.down, self.up) - start)

    def _change(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self.pairs != self.site.groups:
            return self._dense(x, self._product(down, up) * (self.strength * self.scaling))
        return convolve(self._low(x, down) * (self.strength * self.scaling), up, groups=self.site.groups)

    def delta(self) -> Tensor:
        """B A − B0 A0 in the weight's shape, without any scale."""
        return self._product(self.down, self.up) - self._product(self.down0, self.up0)

    def own_pair(self) -> tuple[Tensor, Tensor]:
        """A over A0, and B beside −B0: rank 2r; with groups, group by group."""
        if self.site.kind == "embedding":
            return torch.cat([self.down, self.down0], 1), torch.cat([self.up, -self.up0], 1)
        down = torch.cat([t.unflatten(0, (self.pairs, -1)) for t in (self.down, self.down0)], 1).flatten(0, 1)
        return down, torch.cat([self.up, -self.up0], 1)


class TuckerAdapter(LoRAAdapter):
    """y' = y + s·B(C(A x)) on a convolution: A and B are 1×1, and the core C has the kernel, stride and padding.

    Shapes: `down` (rank, d_in / groups, 1, …), `core` (rank, rank / pairs, *kernel), `up` (d_out, rank / pairs, 1, …).
    """

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(site, rank, scaling, dropout)
        self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *(1 for _ in site.kernel)))
        self.core = nn.Parameter(torch.empty(rank, rank // self.pairs, *site.kernel))

    def _low(self, x: Tensor, down: Tensor) -> Tensor:
        """C (A x)."""
        site = self.site
        low = convolve(x, down, groups=site.groups)
        return convolve(low, self.core, site.stride, site.padding, site.dilation, site.groups)

    def own_pair(self) -> tuple[Tensor, Tensor]:
        """C ×₂ A, with the kernel, and B."""
        core, down = (t.unflatten(0, (self.pairs, -1)) for t in (self.core, self.down.flatten(1)))
        return torch.einsum("gpq...,gqi->gpi...", core, down).flatten(0, 1), self.up
