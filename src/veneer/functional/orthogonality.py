"""Deviation of rows from orthonormality."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormality_error(rows: Tensor) -> Tensor:
    """‖M Mᵀ − I‖_F: a scalar, 0 if the rows of M are orthonormal. `rows`: M, (blocks, rows, width), all blocks together."""
    gram = rows @ rows.mT
    return torch.linalg.vector_norm(gram - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device))
