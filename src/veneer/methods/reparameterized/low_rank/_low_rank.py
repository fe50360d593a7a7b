"""LoRA adapters: plain factors, factors initialized from the weight, and factors with a Tucker core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.convolve import convolve
from veneer.functional.low_rank_autograd import add_product, project
from veneer.functional.low_rank_init import orthonormal, principal
from veneer.injection.attachment.deferred_init import is_init_deferred, zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.quantized_weight import readable_weight, record_of
from veneer.injection.seams.adapter_calls import module_at
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._state_transfer import lora_batched, lora_state

Init = Literal["kaiming", "gaussian", "pissa", "olora", "eva", "loftq"]


def factor_pairs(site: WeightSite, rank: int) -> int:
    """Number of factor pairs of a convolution: one per group if the groups divide the rank, else one on the flattened kernels."""
    return 1 if rank % site.groups else site.groups


def product_of_pair(site: WeightSite, pairs: int, down: Tensor, up: Tensor) -> Tensor:
    """B A in the weight's shape, of a linear layer or a convolution."""
    if pairs == 1:
        return (up.flatten(1) @ down.flatten(1)).reshape(site.weight_shape)
    left, right = by_group(site, down, up)
    return torch.bmm(left, right).reshape(site.weight_shape)


def pair_of_each_group(site: WeightSite, pairs: int, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) with one pair per group: if groups share A, each gets a copy."""
    return (down if pairs == site.groups else torch.cat([down] * site.groups)), up


def by_group(site: WeightSite, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """C (groups, d_out / groups, rank) and D (groups, rank, width) of a pair per group: W + C D with W flattened by groups."""
    left, right = (t.flatten(1).unflatten(0, (site.groups, -1)) for t in (up, down))
    return left, right


def join_pairs(adapter: LoRAAdapter, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(down, up) of the sum of several products of an adapter's shapes: A's stacked, B's side by side; with groups, per group."""
    if adapter.site.kind == "embedding":
        return torch.cat([*downs], 1), torch.cat([*ups], 1)
    return torch.cat([t.unflatten(0, (adapter.pairs, -1)) for t in downs], 1).flatten(0, 1), torch.cat([*ups], 1)


class LoRAAdapter(Adapter):
    """y' = y + s·B(A x), W' = W + s·B A. Shapes: `down` (rank, d_in / groups[, k, k]), `up` (d_out, rank / pairs[, 1, 1]).

    `pairs` is the number of groups, each with its part of A and B, or 1 if they do not divide the rank: then all groups share A,
    and B A is the product of (d_out, rank) and (rank, d_in·k·k / groups), as for a linear layer.
    An embedding stores `down` as (d_in, rank), rows looked up by id, and `up` as (d_out, rank).
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    overwrites: ClassVar[bool] = True

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.site, self.scaling, self.dropout = site, scaling, dropout
        self.pairs = factor_pairs(site, rank)
        if site.kind == "embedding":
            self.down = nn.Parameter(torch.empty(site.d_in, rank))
            self.up = nn.Parameter(zeros(site.d_out, rank))
        else:
            ones = (1,) * len(site.kernel)
            self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
            self.up = nn.Parameter(zeros(site.d_out, rank // self.pairs, *ones))

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y + B (s·A x): the scale is applied to the `rank` intermediate features.

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
        """ΔW x: A x for all groups would have groups·rank features, often more than y has."""
        site = self.site
        return convolve(x, change, site.stride, site.padding, site.dilation, site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·B A, in W's shape."""
        return weight + self.delta() * (self.strength * self.scaling)

    def state_from(self, other: LoRAAdapter | None) -> dict[str, Tensor]:
        """State with which this makes the update of `other`, or none. `ValueError` if its factors exceed this rank."""
        return lora_state(self, other)

    @staticmethod
    def batched_output(
        adapters: Sequence[tuple[LoRAAdapter, float] | None], x: Tensor, y: Tensor, overwrite: bool
    ) -> Tensor | None:
        """`output` for a batch of n samples, each with an adapter and a strength, or None; rows i, i + n, … belong to sample i.

        None unless the layer is linear and dropout is inactive. `overwrite`: y may be modified in place.
        """
        return lora_batched(adapters, x, y, overwrite)

    def delta(self) -> Tensor:
        """B A in the weight's shape, without scales."""
        return self._product(*self.own_pair())

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        return down @ up.T if self.site.kind == "embedding" else product_of_pair(self.site, self.pairs, down, up)

    def own_pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the same update as an ordinary LoRA with this scale and the same number of `pairs`."""
        return self.down, self.up

    def pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the same update as an ordinary LoRA with this scale and one pair per group, for formats that need this.

        If groups share A, each gets a copy: rank groups·rank.
        """
        return pair_of_each_group(self.site, self.pairs, *self.own_pair())

    def factors(self) -> tuple[Tensor, Tensor]:
        """C (groups, d_out / groups, rank) and D (groups, rank, width), s in C: W' = W + C D with W flattened group by group.

        An embedding is one group, whose outputs are its rows.
        """
        down, up = self.pair()
        left, right = (down[None], up.T[None]) if self.site.kind == "embedding" else by_group(self.site, down, up)
        return left * (self.strength * self.scaling), right


class WeightInitAdapter(LoRAAdapter):
    """y' = y + s·(B A x − B0 A0 x), W' = W + s·(B A − B0 A0), where A and B are initialized to A0 and B0, a part of W.

    This equals an ordinary LoRA on W0 = W − s·B0 A0, with the same training, without modifying the base. `down0`, `up0`
    are A0 and B0; they are saved, because a decomposition is not unique. Until `enter` they and B are zero.
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
        """Initializes from the host's weight (Ŵ if it is quantized), in float32 or better; per group for grouped convolutions."""
        site, weight = self.site, readable_weight(tower, self.site, "lora", "init")
        if is_init_deferred() or weight.is_meta:
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
        """Bitwise y while A and B have their initial values. Dropout applies to A only, because A0 belongs to the weight."""
        start = self._change(x, self.down0, self.up0)
        if self.dropout and self.site.kind != "embedding":
            x = F.dropout(x, self.dropout, self.training)
        return y + (self._change(x, self.down, self.up) - start)

    def _change(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self.pairs != self.site.groups:
            return self._dense(x, self._product(down, up) * (self.strength * self.scaling))
        return convolve(self._low(x, down) * (self.strength * self.scaling), up, groups=self.site.groups)

    def delta(self) -> Tensor:
        """B A − B0 A0 in the weight's shape, without scales."""
        return self._product(self.down, self.up) - self._product(self.down0, self.up0)

    def own_pair(self) -> tuple[Tensor, Tensor]:
        """A stacked on A0, and B beside −B0: rank 2r; with groups, per group."""
        return join_pairs(self, (self.down, self.down0), (self.up, -self.up0))


class CorrectionAdapter(LoRAAdapter):
    """A LoRA that is initialized to the low-rank correction of a quantized weight: s·B A = W − Ŵ as nearly as its rank allows."""

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Reads the correction that was computed when the layer was quantized.

        Raises:
            OptionError: there is none, or its rank is lower than that of the adapter.
        """
        site, rank = self.site, len(self.down)
        if is_init_deferred() or self.down.is_meta:
            return
        record = record_of(module_at(tower, site.path), site.param)
        correction = None if record is None else record.correction
        kept = 0 if correction is None else len(correction[0])
        if correction is None or kept < rank:
            message = (
                f"lora: init='loftq' needs a quantized weight with a correction of rank {rank} or more at {site.name}, which has "
                f"{kept}. Quantize the base model with it, such as nf4+loftq{rank}, and select quantized layers by where."
            )
            raise OptionError(message, option="init", method="lora", where=site.name, given=kept, expected=rank)
        down, up = correction
        root = self.scaling**0.5
        self.down.copy_(down[:rank].to(self.down) / root)
        self.up.copy_(up[slice(*(site.rows or (None,))), :rank].to(self.up) / root)


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
