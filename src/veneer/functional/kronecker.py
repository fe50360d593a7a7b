"""Kronecker products as weights: (C ⊗ D)[u·V + v, …] = C[u, …] D[v, …], applied without materializing them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .low_rank_autograd import needs_plain_ops, output_buffer


class _Mix(torch.autograd.Function):
    """C X_n for X (n, q, m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor) -> Tensor:
        ctx.save_for_backward(x, left)
        return torch.bmm(left.expand(len(x), -1, -1), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, left = ctx.saved_tensors
        (g,) = grads
        to_x, to_left = ctx.needs_input_grad
        mixed = torch.bmm(left.mT.expand(len(x), -1, -1), g) if to_x else None
        return mixed, torch.bmm(g, x.mT).sum(0) if to_left else None


class _AddKron(torch.autograd.Function):
    """y + C X_n Dᵀ, one block of rows after the other. C X_n is recomputed for the gradients, which is cheap for a small C."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, left: Tensor, right: Tensor, over: bool) -> Tensor:
        ctx.save_for_backward(x, left, right)
        return output_buffer(y, over).addmm_(_mix_rows(x, left), right.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        (g,) = grads
        _, to_x, to_left, to_right, _ = ctx.needs_input_grad
        by_right = (_mix_rows(x, left).mT @ g).mT if to_right else None
        if not (to_x or to_left):
            return g, None, None, by_right, None
        inner = (g @ right).view(-1, len(left), x.shape[-1])
        by_left = torch.bmm(inner, _blocks(x, left).mT).sum(0) if to_left else None
        return g, _mix_rows(inner, left.mT) if to_x else None, by_left, by_right, None


def _blocks(x: Tensor, left: Tensor) -> Tensor:
    """X_n, (n, q, s)."""
    return x.reshape(-1, left.shape[1], x.shape[-1])


def _mix_rows(x: Tensor, left: Tensor) -> Tensor:
    """C X_n, as rows (n·p, s)."""
    blocks = _blocks(x, left)
    return torch.bmm(left.expand(len(blocks), -1, -1), blocks).view(-1, x.shape[-1])


def add_kron(y: Tensor, x: Tensor, left: Tensor, right: Tensor, over: bool = False) -> Tensor:
    """y + (C ⊗ D) x, both split into rows: C X Dᵀ for each q rows X of x is added to p rows of y.

    Args:
        y: (n·p, r). x: (n·q, s). left: C, (p, q). right: D, (r, s).
        over: modifies y in place, as in `add_product`.
    """
    if needs_plain_ops(y, x, left, right):
        mixed = mix(_blocks(x, left), left)
        return y + F.linear(mixed.reshape(-1, x.shape[-1]), right)
    total: Tensor = _AddKron.apply(y, x, left, right, over)
    return total


def mix(x: Tensor, left: Tensor) -> Tensor:
    """C X for each X, with a small C.

    Args:
        x: (n, q, m). left: C, (p, q).
    Returns:
        (n, p, m).
    """
    if needs_plain_ops(x, left):
        return torch.bmm(left.to(x.dtype).expand(len(x), -1, -1), x)
    mixed: Tensor = _Mix.apply(x, left)
    return mixed


def kron_factors(width: int, factor: int = -1) -> tuple[int, int]:
    """Factors `width` into two integers, the smaller first.

    Args:
        width: at least 1.
        factor: one of the two, if it divides `width`; else the smaller is the largest divisor up to `factor` and to the square
            root of `width`. -1 for the factors closest to each other.

    >>> kron_factors(320), kron_factors(320, 8), kron_factors(768, 7)
    ((16, 20), (8, 40), (6, 128))
    """
    if factor > 0 and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    limit = math.isqrt(width) if factor < 0 else min(factor, math.isqrt(width))
    small = next(u for u in range(limit, 0, -1) if width % u == 0)
    return small, width // small


def kron_weight(left: Tensor, right: Tensor, swapped: bool = False) -> Tensor:
    """C ⊗ D over the first two dimensions.

    Args:
        left: C, (p, q). right: D, (r, s, *kernel).
        swapped: rows in the order (D's row, C's row) instead: row v·p + u is C[u] ⊗ D[v].
    Returns:
        (p·r, q·s, *kernel).
    """
    product = torch.kron(left.reshape(*left.shape, *(1,) * (right.ndim - 2)), right)
    return product.unflatten(0, (len(left), len(right))).transpose(0, 1).flatten(0, 1) if swapped else product


def kron_apply(x: Tensor, left: Tensor, right: Callable[[Tensor], Tensor], kernel_dims: int = 0, swapped: bool = False) -> Tensor:
    """(C ⊗ D) x = C X Dᵀ, where X (q, s) is x in rows of s; the result is its rows concatenated.

    C and D act on different dimensions, so the one that makes the tensor smaller is applied first.

    Args:
        x: (…, q·s), or (batch, q·s, *size) for a convolution.
        left: C, (p, q).
        right: applies D: (n, s, *size) to (n, r, *size'), a matrix product or a convolution.
        kernel_dims: number of size dimensions after the channels.
        swapped: as in `kron_weight`.
    Returns:
        (…, p·r), or (batch, p·r, *size').
    """
    dim = x.ndim - 1 - kernel_dims
    z = x.reshape(-1, left.shape[1], x.shape[dim] // left.shape[1], *x.shape[dim + 1 :])

    def inner(z: Tensor) -> Tensor:
        return right(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def outer(z: Tensor) -> Tensor:
        return mix(z.flatten(2), left).unflatten(2, z.shape[2:])

    z = inner(outer(z)) if left.shape[0] < left.shape[1] else outer(inner(z))
    z = (z.transpose(1, 2) if swapped else z).flatten(1, 2)
    return z.reshape(*x.shape[:dim], *z.shape[1:])
