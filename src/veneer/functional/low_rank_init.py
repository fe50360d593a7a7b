"""Low-rank factors initialized from a weight."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Columns beyond the rank in the randomized decomposition; Halko et al. recommend 5 or 10."""


def principal(weight: Tensor, rank: int, scaling: float, niter: int = 0) -> tuple[Tensor, Tensor]:
    """A = √(Σ_r / s) V_rᵀ and B = U_r √(Σ_r / s) for W = U Σ Vᵀ, so that s·B A is the best approximation of W of that rank.

    Args:
        weight: (…, d_out, d_in). `rank`: at most the smaller of both.
        scaling: s, above 0.
        niter: 0 for the exact decomposition; else power iterations of the randomized one, which uses torch's global
            generator and finds only the largest singular values: nearly as accurate from 2 on, much faster for large weights.
    Returns:
        A (…, rank, d_in) and B (…, d_out, rank).
    Source: Meng et al., PiSSA, NeurIPS 2024, divided by s as in peft; Halko et al., SIAM Review 2011.
    """
    if niter:
        U, S, V = torch.svd_lowrank(weight, min(rank + OVERSAMPLING, *weight.shape[-2:]), niter)
        Vh = V.mT
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[..., :rank] / scaling).sqrt()
    return root[..., :, None] * Vh[..., :rank, :], U[..., :rank] * root[..., None, :]


def orthonormal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = R[:r] and B = Q[:, :r] for W = Q R: the columns of B are orthonormal, and B A is the projection of W on them.

    Shapes as in `principal`. Source: Büyükakyüz, OLoRA, 2024; peft `olora_init`.
    """
    Q, R = torch.linalg.qr(weight)
    return R[..., :rank, :], Q[..., :rank]
