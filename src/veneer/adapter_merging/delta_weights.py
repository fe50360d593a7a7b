"""ΔW of an adapter at a weight, as low-rank factors if the adapter has any, else as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.functional.low_rank import oblong_svd, product_norm, product_svd
from veneer.injection import Attachment, StateError, VeneerError
from veneer.injection.adapter_forms import BiasAdapter, LowRankAdapter, PairAdapter, WeightAdapter
from veneer.injection.composition.merge import widened
from veneer.injection.seams.adapter_calls import base_tensor, blend
from veneer.injection.sites import WeightSite


class CombineError(VeneerError):
    """Adapters or models that cannot be merged."""


@dataclass(frozen=True)
class DeltaWeight:
    """ΔW in double precision, by convolution group.

    Args:
        factors: C (groups, rows, rank) and D (groups, rank, width) with ΔW = C D; or None.
        matrix: ΔW (groups, rows, width); or None if there are factors.
    """

    factors: tuple[Tensor, Tensor] | None = None
    matrix: Tensor | None = None

    def dense(self) -> Tensor:
        """ΔW as a matrix (groups, rows, width)."""
        if self.matrix is not None:
            return self.matrix
        assert self.factors is not None
        return self.factors[0] @ self.factors[1]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and Vᵀ, computed from the factors if there are any."""
        return product_svd(*self.factors) if self.factors else oblong_svd(self.dense())

    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return product_norm(*self.factors) if self.factors else float(torch.linalg.vector_norm(self.dense()))

    def distance(self, left: Tensor, right: Tensor) -> float:
        """‖ΔW − C D‖, Frobenius."""
        if self.factors is None:
            return float(torch.linalg.vector_norm(self.dense() - left @ right))
        return product_norm(torch.cat([self.factors[0], -left], 2), torch.cat([self.factors[1], right], 1))


def weighted_sum(changes: list[DeltaWeight], weights: list[float]) -> DeltaWeight:
    """Σ w·ΔW, as concatenated factors if all changes have factors."""
    pairs = [c.factors for c in changes if c.factors is not None]
    if len(pairs) < len(changes):
        return DeltaWeight(matrix=sum((w * c.dense() for c, w in zip(changes, weights, strict=True)), torch.zeros(())))
    left = torch.cat([w * c for (c, _), w in zip(pairs, weights, strict=True)], 2)
    return DeltaWeight(factors=(left, torch.cat([d for _, d in pairs], 1)))


@torch.no_grad()
def delta_weight_of(attachment: Attachment, name: str) -> DeltaWeight:
    """ΔW of an attachment at one weight, at its current strength: its factors, or weight(W) − W.

    Raises:
        CombineError: the adapter does not act on a weight, has no weight form, or the base weight cannot be read.
    """
    site: Any = attachment.parts[name][0]
    adapter: Any = attachment.parts[name][1]
    if not isinstance(site, WeightSite) or not isinstance(adapter, WeightAdapter) or isinstance(adapter, BiasAdapter):
        raise CombineError(
            f"'{attachment.name}' ({attachment.method.name}) at {name} is not a weight update, so that it cannot be merged into "
            "a LoRA. Keep it in its own file.",
            where=name,
            given=attachment.name,
            expected="weight",
        )
    with widened(attachment.parts[name][1], torch.float64):
        if isinstance(adapter, LowRankAdapter):
            left, right = adapter.factors()
            return DeltaWeight(factors=(left.detach().clone(), right.detach().clone()))
        weight = base_tensor(attachment.towers[site.component], site.path, site.param)
        if not weight.is_floating_point() or weight.is_meta:
            message = f"'{attachment.name}' at {name}: ΔW depends on W, which is quantized or on meta. Load the base unquantized."
            raise CombineError(message, where=name, given=attachment.name, expected="W")
        rows = (weight if site.rows is None else weight[slice(*site.rows)]).double()
        return DeltaWeight(matrix=grouped(blend(adapter, adapter.weight, rows) - rows, site))


def grouped(weight: Tensor, site: WeightSite) -> Tensor:
    """A weight as (groups, rows, width)."""
    return weight.flatten(1).unflatten(0, (site.groups, -1))


def check_mergeable(attachment: Attachment) -> None:
    """Raises an error for attachments that are merged, or that contain more than weight updates.

    Raises:
        StateError: it is merged. CombineError: it has trained base parameters too.
    """
    if attachment.merged:
        message = f"'{attachment.name}' is merged. Call unmerge() first."
        raise StateError(message, where=attachment.name, given="merged")
    if attachment.extras:
        raise CombineError(
            f"'{attachment.name}' has trained base parameters too ({', '.join(list(attachment.extras)[:4])}), which a LoRA "
            "cannot contain.",
            where=attachment.name,
            given=tuple(attachment.extras),
        )


def unscaled_factors(adapter: Any) -> tuple[Tensor, Tensor, float] | None:
    """(down, up, scaling) of a LoRA at strength 1, bitwise; None if the adapter is another one."""
    if not isinstance(adapter, PairAdapter) or float(adapter.strength) != 1:
        return None
    down, up = adapter.pair()
    return down.detach().clone(), up.detach().clone(), float(adapter.scaling)
