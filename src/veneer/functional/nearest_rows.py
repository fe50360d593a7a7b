"""Nearest rows of a table by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def nearest_rows(vectors: Tensor, table: Tensor, excluded: Sequence[int] = ()) -> Tensor:
    """For each vector the index of the row with the largest cosine similarity: argmax_i v·e_i / |e_i|.

    Args:
        vectors: (n, width). `table`: (rows, width). `excluded`: indices of rows that are left out.
    Returns:
        Indices (n,), int64.
    """
    products = vectors.to(table.dtype) @ table.T / table.norm(dim=1).clamp(min=1e-12)
    products[:, list(excluded)] = -torch.inf
    return products.argmax(1)


def random_rows(count: int, rows: int, excluded: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
    """Uniformly sampled indices (count,) of rows, without those in `excluded`. On the CPU."""
    allowed = torch.ones(rows, device="cpu")
    allowed[list(excluded)] = 0
    return torch.multinomial(allowed, count, replacement=True, generator=generator)
