"""y_i + B_i A_i x_i: a separate low-rank product for each sample of a batch, computed together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def add_products(x: Tensor, y: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], over: bool = False) -> Tensor:
    """y + B x' with x' = A x, where the rows i, i + n, i + 2n, … have the i-th A and B.

    Lower ranks are zero-padded to the highest, so that the cost is that of one product of the highest rank on all rows.

    Args:
        x: (m·n, …, d_in). y: (m·n, …, d_out).
        downs: n matrices A, (r, d_in). ups: n matrices B, (d_out, r), including any scale.
        over: modifies y in place if gradients are disabled; y must not be used elsewhere.
    Returns:
        y's shape, in the dtype of the sum.
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
