"""Weight updates as task vectors: trimming, sign election and disjoint means (TIES), dropping and rescaling (DARE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(change: Tensor, density: float) -> Tensor:
    """Keeps the fraction `density` of elements with the largest magnitude, at least one; the others become zero."""
    flat = change.flatten()
    largest = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(change)


def drop(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """δ ∘ m / density with m ~ Bernoulli(density): keeps a random fraction, rescaled so that the expectation is δ.

    Args:
        generator: on the CPU, so that samples do not depend on the device.
    """
    stays = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return change * stays.to(change.device) / density


def elected_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elects the sign of the sum for each element, then averages |w|·τ over the task vectors with that sign.

    A negative weight flips its task vector before the election.
    """
    signed = torch.stack([change if weight >= 0 else -change for change, weight in zip(changes, weights, strict=True)])
    elected = torch.where(signed.sum(0) >= 0, 1.0, -1.0)
    agree = signed.sign() == elected
    scale = torch.tensor([abs(w) for w in weights], dtype=signed.dtype, device=signed.device)
    weighted = signed * scale.view(-1, *(1,) * (signed.ndim - 1))
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
