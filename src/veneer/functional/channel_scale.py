"""l ∘ y + t: features scaled by a learned vector, with one pass over memory in forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .low_rank_autograd import needs_plain_ops

CHUNK = 2**16  # elements processed at a time, so that they stay in a core's cache


class _ScaleFeatures(torch.autograd.Function):
    """y (n, d) with gain and shift (d), or y (n, d, size) with gain and shift (d, 1)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, gain)
        return y * gain if shift is None else torch.addcmul(shift, y, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dy = l ∘ g, dl = Σ g ∘ y, dt = Σ g; each piece of g is read once for all three."""
        (g,) = grads
        y, gain = ctx.saved_tensors
        to_y, to_gain, to_shift = ctx.needs_input_grad
        if torch.is_grad_enabled():  # double backward
            over = [0] if g.ndim == 2 else [0, 2]
            sums = [(t.sum(over).view_as(gain) if need else None) for t, need in ((g * y, to_gain), (g, to_shift))]
            return g * gain if to_y else None, *sums
        dy = torch.empty_like(g) if to_y else None
        dgain = torch.zeros_like(gain) if to_gain else None
        dshift = torch.zeros_like(gain) if to_shift else None
        rows = max(1, CHUNK // g[0].numel())
        for start in range(0, len(g), rows):
            part = g[start : start + rows]
            if dgain is not None:
                dgain += _sum_positions(part * y[start : start + rows])
            if dshift is not None:
                dshift += _sum_positions(part)
            if dy is not None:
                torch.mul(part, gain, out=dy[start : start + rows])
        return dy, dgain, dshift


def _sum_positions(part: Tensor) -> Tensor:
    """Sums over all dimensions except the features."""
    return part.sum(0) if part.ndim == 2 else part.sum((0, 2)).unsqueeze(1)


def scale_features(y: Tensor, gain: Tensor, shift: Tensor | None = None, channels: bool = False) -> Tensor:
    """l ∘ y + t, per feature.

    Args:
        y: (…, d), or (batch, d, *size) with `channels`.
        gain, shift: l and t, (d,); None means t = 0.
    """
    if needs_plain_ops(y, gain) or (shift is not None and shift.dtype != y.dtype):
        ones = (-1, *(1,) * (y.ndim - 2)) if channels else (-1,)
        scaled = y * gain.view(ones)
        return scaled if shift is None else scaled + shift.view(ones)
    if not channels:
        found: Tensor = _ScaleFeatures.apply(y.reshape(-1, y.shape[-1]), gain, shift)
    else:
        found = _ScaleFeatures.apply(y.flatten(2), gain.unsqueeze(1), None if shift is None else shift.unsqueeze(1))
    return found.view(y.shape)
