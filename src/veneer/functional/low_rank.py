"""Products C D of tall and wide matrices: SVD without forming the product, truncation, and norm."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of C D, by C = Q1 R1 and Dᵀ = Q2 R2: C D = Q1 (R1 R2ᵀ) Q2ᵀ, where R1 R2ᵀ is as small as the rank.

    Args:
        left: C, (…, m, r). right: D, (…, r, n).
    Returns:
        (…, m, k), (…, k) and (…, k, n) with k = min(m, r, n).
    """
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    return q1 @ u, s, vh @ q2.mT


def oblong_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of a matrix, by Aᵀ = Q R if it is wide: A = Rᵀ Qᵀ, where Rᵀ is square. Many times faster for kernels.

    Args:
        matrix: (…, m, n).
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        u, s, vh = oblong_svd(matrix.mT)
        return vh.mT, s, u.mT
    q, r = torch.linalg.qr(matrix.mT)
    u, s, vh = torch.linalg.svd(r.mT, full_matrices=False)
    return u, s, vh @ q.mT


def truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """C and D of the first `rank` singular values, √σ in each: the best approximation of U diag(σ) Vᵀ of this rank.

    Returns:
        (…, m, rank) and (…, rank, n).
    """
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]


def product_norm(left: Tensor, right: Tensor) -> float:
    """‖C D‖ (Frobenius), as ‖R1 R2ᵀ‖: without forming the product or the rounding error of ‖C D‖² = Σ (CᵀC)∘(D Dᵀ)."""
    r1, r2 = (torch.linalg.qr(t, mode="r").R for t in (left, right.mT))
    return float(torch.linalg.vector_norm(r1 @ r2.mT))
