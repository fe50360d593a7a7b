"""Room for smaller factors: the same product, or the same block-diagonal matrix, out of larger parts. Exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cayley import skew


def padded(tensor: Tensor, size: int, dim: int, groups: int = 1) -> Tensor:
    """Zeros after what is there along `dim`, up to `size`, in each of `groups` equal parts.

    [A; 0] and [B, 0] have the product B A.

    Args:
        size: of all parts together, a multiple of `groups`.
    Raises:
        ValueError: there is more than fits.
    """
    if tensor.shape[dim] > size:
        raise ValueError(f"it has rank {tensor.shape[dim]}, and there is room for {size}")
    parts = tensor.unflatten(dim, (groups, -1))
    behind = parts.ndim - 2 - dim
    return F.pad(parts, (0, 0) * behind + (0, (size - tensor.shape[dim]) // groups)).flatten(dim, dim + 1)


def joined_blocks(entries: Tensor, size: int, wide: int, count: int) -> Tensor:
    """Skew-symmetric blocks of side `wide` with those of side `size` along their diagonals, as entries above the diagonal.

    Cayley's transform of a block-diagonal matrix is that of its blocks, so that both turn alike.

    Args:
        entries: (n, size·(size − 1) / 2); n is count·wide / size, or 1 for the same block everywhere.
    Returns:
        (count, wide·(wide − 1) / 2).
    Raises:
        ValueError: they do not fit.
    """
    every, left = divmod(wide, size)
    if left or len(entries) not in (1, count * every):
        raise ValueError(f"it has {len(entries)} blocks of side {size}, which do not make up {count} of side {wide}")
    blocks = skew(entries, size).expand(count * every, -1, -1).unflatten(0, (count, every))
    whole = torch.diag_embed(blocks.permute(0, 2, 3, 1), dim1=1, dim2=3)  # (count, every, size, every, size)
    rows, columns = torch.triu_indices(wide, wide, 1, device=entries.device)
    return whole.reshape(count, wide, wide)[:, rows, columns]
