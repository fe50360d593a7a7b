"""Changes of weights as vectors: trimming, electing signs and disjoint means (TIES), dropping and rescaling (DARE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(change: Tensor, density: float) -> Tensor:
    """The share `density` of the numbers that are largest in magnitude, at least one; the others zero."""
    flat = change.flatten()
    largest = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(change)


def drop(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """δ ∘ m / density with m ~ Bernoulli(density): a random share stays, and is scaled so that the mean is δ.

    Args:
        generator: on the CPU, so that draws do not depend on the device.
    """
    stays = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return change * stays.to(change.device) / density


def elected_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Where changes disagree in sign, that of the larger sum is elected; then the mean of |w|·τ over those that have it.

    A negative weight turns its change around before the election.
    """
    turned = torch.stack([change if weight >= 0 else -change for change, weight in zip(changes, weights, strict=True)])
    elected = torch.where(turned.sum(0) >= 0, 1.0, -1.0)
    agree = turned.sign() == elected
    scale = torch.tensor([abs(w) for w in weights], dtype=turned.dtype, device=turned.device)
    weighted = turned * scale.view(-1, *(1,) * (turned.ndim - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
