"""Pads factors with zeros to larger shapes: the same product, or the same block-diagonal matrix. Exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cayley import skew


def pad_zeros(tensor: Tensor, size: int, dim: int, groups: int = 1) -> Tensor:
    """Pads with zeros along `dim` up to `size`, in each of `groups` equal parts.

    [A; 0] and [B, 0] have the product B A.

    Args:
        size: total over all parts, a multiple of `groups`.
    Raises:
        ValueError: the tensor is larger.
    """
    if tensor.shape[dim] > size:
        raise ValueError(f"it has rank {tensor.shape[dim]}, more than {size}")
    parts = tensor.unflatten(dim, (groups, -1))
    behind = parts.ndim - 2 - dim
    return F.pad(parts, (0, 0) * behind + (0, (size - tensor.shape[dim]) // groups)).flatten(dim, dim + 1)


def merge_blocks(entries: Tensor, size: int, wide: int, count: int) -> Tensor:
    """Skew-symmetric blocks of size `wide` with those of size `size` along their diagonals, as entries above the diagonal.

    The Cayley transform of a block-diagonal matrix is that of its blocks, so that both give the same rotation.

    Args:
        entries: (n, size·(size − 1) / 2); n is count·wide / size, or 1 for the same block everywhere.
    Returns:
        (count, wide·(wide − 1) / 2).
    Raises:
        ValueError: incompatible block sizes.
    """
    every, remainder = divmod(wide, size)
    if remainder or len(entries) not in (1, count * every):
        raise ValueError(f"it has {len(entries)} blocks of size {size}, which cannot form {count} blocks of size {wide}")
    blocks = skew(entries, size).expand(count * every, -1, -1).unflatten(0, (count, every))
    whole = torch.diag_embed(blocks.permute(0, 2, 3, 1), dim1=1, dim2=3)  # (count, every, size, every, size)
    rows, columns = torch.triu_indices(wide, wide, 1, device=entries.device)
    return whole.reshape(count, wide, wide)[:, rows, columns]
