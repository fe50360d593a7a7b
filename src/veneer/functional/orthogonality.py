"""How far rows are from orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor


def from_orthonormal(rows: Tensor) -> Tensor:
    """‖M Mᵀ − I‖_F: a scalar, 0 where the rows of M are orthonormal. `rows`: M, (blocks, rows, width), each block by itself."""
    gram = rows @ rows.mT
    return torch.linalg.vector_norm(gram - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device))
