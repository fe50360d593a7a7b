"""The change that an adapter makes to a weight, as a product of low rank where it is one, else as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.functional.low_rank import oblong_svd, product_norm, product_svd
from veneer.injection import Attachment, StateError, VeneerError
from veneer.injection.adapter_forms import BiasAdapter, LowRankAdapter, PairAdapter, WeightAdapter
from veneer.injection.composition.merge_kernels import widened
from veneer.injection.seams.adapter_calls import base_tensor, blend
from veneer.injection.sites import WeightSite


class CombineError(VeneerError):
    """Adapters or models that cannot be combined as asked."""


@dataclass(frozen=True)
class Change:
    """ΔW in double precision, group by group.

    Args:
        factors: C (groups, rows, rank) and D (groups, rank, width) with ΔW = C D; or None.
        matrix: ΔW (groups, rows, width); or None where there are factors.
    """

    factors: tuple[Tensor, Tensor] | None = None
    matrix: Tensor | None = None

    def dense(self) -> Tensor:
        """(groups, rows, width)."""
        if self.matrix is not None:
            return self.matrix
        assert self.factors is not None
        return self.factors[0] @ self.factors[1]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and Vᵀ; by way of the factors, where there are any."""
        return product_svd(*self.factors) if self.factors else oblong_svd(self.dense())

    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return product_norm(*self.factors) if self.factors else float(torch.linalg.vector_norm(self.dense()))

    def distance(self, left: Tensor, right: Tensor) -> float:
        """‖ΔW − C D‖, Frobenius."""
        if self.factors is None:
            return float(torch.linalg.vector_norm(self.dense() - left @ right))
        return product_norm(torch.cat([self.factors[0], -left], 2), torch.cat([self.factors[1], right], 1))


def added(changes: list[Change], weights: list[float]) -> Change:
    """Σ w·ΔW; as factors side by side, where all are factors."""
    pairs = [c.factors for c in changes if c.factors is not None]
    if len(pairs) < len(changes):
        return Change(matrix=sum((w * c.dense() for c, w in zip(changes, weights, strict=True)), torch.zeros(())))
    left = torch.cat([w * c for (c, _), w in zip(pairs, weights, strict=True)], 2)
    return Change(factors=(left, torch.cat([d for _, d in pairs], 1)))


@torch.no_grad()
def change_of(attachment: Attachment, name: str) -> Change:
    """What an attachment does to one weight at its strength: weight(W) − W, or the factors of the sum that it is.

    Raises:
        CombineError: the adapter is none of a weight, has no weight form, or the base's weight is not there to be read.
    """
    site: Any = attachment.parts[name][0]
    adapter: Any = attachment.parts[name][1]
    if not isinstance(site, WeightSite) or not isinstance(adapter, WeightAdapter) or isinstance(adapter, BiasAdapter):
        raise CombineError(
            f"'{attachment.name}' ({attachment.method.name}) at {name} is no change of a weight, which a LoRA could hold. "
            "Leave it out, or keep it beside in its own file.",
            where=name,
            given=attachment.name,
            expected="weight",
        )
    with widened(attachment.parts[name][1], torch.float64):
        if isinstance(adapter, LowRankAdapter):
            left, right = adapter.factors()
            return Change(factors=(left.detach().clone(), right.detach().clone()))
        weight = base_tensor(attachment.towers[site.component], site.path, site.param)
        if not weight.is_floating_point() or weight.is_meta:
            message = f"'{attachment.name}' at {name}: its change depends on W, which is quantised or not there."
            raise CombineError(message, where=name, given=attachment.name, expected="W")
        rows = (weight if site.rows is None else weight[slice(*site.rows)]).double()
        return Change(matrix=grouped(blend(adapter, adapter.weight, rows) - rows, site))


def grouped(weight: Tensor, site: WeightSite) -> Tensor:
    """(groups, rows, width) of a weight."""
    return weight.flatten(1).unflatten(0, (site.groups, -1))


def refuse(attachment: Attachment) -> None:
    """Raise for what has no change of its own, or more than changes of weights.

    Raises:
        StateError: it is merged. CombineError: it has trained base parameters as well.
    """
    if attachment.merged:
        message = f"'{attachment.name}' is merged. Call unmerge() before combining it."
        raise StateError(message, where=attachment.name, given="merged")
    if attachment.extras:
        raise CombineError(
            f"'{attachment.name}' has trained {', '.join(list(attachment.extras)[:4])} of the base as well, which a LoRA has no "
            "place for.",
            where=attachment.name,
            given=tuple(attachment.extras),
        )


def pair_as_it_is(adapter: Any) -> tuple[Tensor, Tensor, float] | None:
    """(down, up, scaling) of an adapter that is a LoRA at strength 1, bitwise; None for another."""
    if not isinstance(adapter, PairAdapter) or float(adapter.strength) != 1:
        return None
    down, up = adapter.pair()
    return down.detach().clone(), up.detach().clone(), float(adapter.scaling)
