"""y_i + B_i A_i x_i: a product of low rank for each sample of a batch, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def add_products(x: Tensor, y: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], over: bool = False) -> Tensor:
    """y + B x' with x' = A x, where the rows i, i + n, i + 2n, … have the i-th A and B.

    Lower ranks are padded to the highest. The work is that of one product of the highest rank on all rows.

    Args:
        x: (m·n, …, d_in). y: (m·n, …, d_out).
        downs: n times A, (r, d_in). ups: n times B, (d_out, r), any scale within.
        over: write over y, which then nobody may need; without gradients only.
    Returns:
        y's shape, in the dtype that the sum has.
    """
    rank, copies = max(len(a) for a in downs), len(x) // len(downs)
    down = torch.stack([F.pad(a, (0, 0, 0, rank - len(a))) for a in downs]).repeat(copies, 1, 1)
    up = torch.stack([F.pad(b, (0, rank - b.shape[1])) for b in ups]).repeat(copies, 1, 1)
    low = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), down.mT)
    rows = y.reshape(len(y), -1, y.shape[-1])
    if rows.dtype != low.dtype or torch.is_autocast_enabled(x.device.type):
        return (rows + torch.bmm(low, up.mT)).view(y.shape)
    total = rows.baddbmm_(low, up.mT) if over and not torch.is_grad_enabled() else torch.baddbmm(rows, low, up.mT)
    return total.view(y.shape)
