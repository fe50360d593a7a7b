"""Orthogonal matrices as Cayley transforms of skew-symmetric ones, R = (I + Q)(I − Q)⁻¹, and block-diagonal products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .low_rank_autograd import needs_plain_ops


class _BlockRotation(torch.autograd.Function):
    """x + x M, with each row of x (n, k·b) in k parts, each with its block of M (k, b, b); written directly into the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(x, change)
        return _rotate_into(x, change)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, change = ctx.saved_tensors
        (g,) = grads
        to_x, to_change = ctx.needs_input_grad
        blocks = torch.bmm(_split(x, change).mT, _split(g, change)) if to_change else None  # first: frees its temporary memory
        if not to_x:
            return None, blocks
        return _rotate(g, change.mT) if torch.is_grad_enabled() else _rotate_into(g, change.mT), blocks


class _Cayley(torch.autograd.Function):
    """M = 2 Q (I − Q)⁻¹. As (I − Q)⁻¹ = I + M / 2 = P, dM = 2 P dQ P: the gradient needs only M, no second solve."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        change = _solve(q)
        ctx.save_for_backward(change)
        return change

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (change,) = ctx.saved_tensors
        transposed = (torch.eye(change.shape[-1], dtype=change.dtype, device=change.device) + change / 2).mT
        return 2 * (transposed @ grads[0] @ transposed)


def _solve(q: Tensor) -> Tensor:
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    return torch.linalg.solve(identity - q, 2 * q, left=False)


def _split(x: Tensor, change: Tensor) -> Tensor:
    """(k, n, b), a view of x."""
    return x.unflatten(1, (len(change), -1)).transpose(0, 1)


def _rotate_into(x: Tensor, change: Tensor) -> Tensor:
    parts, rotated = _split(x, change), torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.baddbmm(parts, parts, change, out=_split(rotated, change))
    return rotated


def _rotate(x: Tensor, change: Tensor) -> Tensor:
    parts = _split(x, change)
    return torch.baddbmm(parts, parts, change).transpose(0, 1).reshape(x.shape)


def rotate_features(x: Tensor, change: Tensor) -> Tensor:
    """Rotates each part of x: x_i R_i = x_i + x_i (R_i − I).

    Args:
        x: (…, d). change: R_i − I, (d / b, b, b), or (1, b, b) for the same block everywhere.
    """
    flat = x.reshape(-1, x.shape[-1])
    every = change.expand(flat.shape[1] // change.shape[-1], -1, -1)
    if needs_plain_ops(x, change):
        return _rotate(flat, every.to(x.dtype)).view(x.shape)
    rotated: Tensor = _BlockRotation.apply(flat, every)
    return rotated.view(x.shape)


def skew(entries: Tensor, size: int) -> Tensor:
    """Q = −Qᵀ from the entries above its diagonal, row by row.

    Args:
        entries: (…, size·(size − 1) / 2).
    Returns:
        (…, size, size).
    """
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(*entries.shape[:-1], size, size)
    upper[..., rows, columns] = entries
    return upper - upper.mT


def cayley_change(q: Tensor) -> Tensor:
    """R − I = 2 Q (I − Q)⁻¹: exactly zero where Q is, and without the rounding error of subtracting I.

    Solved exactly, in float32 or better. I − Q is invertible for every skew-symmetric Q.

    Args:
        q: skew-symmetric, (…, size, size).
    Returns:
        The same shape, in `q`'s dtype.
    """
    precise = q.to(torch.promote_types(q.dtype, torch.float32))
    if needs_plain_ops(precise):
        return _solve(precise).to(q.dtype)
    change: Tensor = _Cayley.apply(precise)
    return change.to(q.dtype)


def neumann_change(q: Tensor, terms: int) -> Tensor:
    """R − I of the truncated Neumann series of (I + Q)(I − Q)⁻¹: 2 Q + 2 Q² + … + 2 Qⁿ⁻¹ + Qⁿ with n = terms − 1, as in peft.

    The result is only approximately orthogonal. As in peft, 1 term gives R = I, 2 terms give 2 Q, and 3 terms count as 4.

    Args:
        q: skew-symmetric, (…, size, size). terms: at least 1.
    Returns:
        The same shape, in `q`'s dtype.
    """
    precise = q.to(torch.promote_types(q.dtype, torch.float32))
    if terms < 3:
        return 2 * (terms - 1) * q
    change = precise
    for _ in range(max(3, terms - 1) - 1):  # Horner's scheme: Q (2 + change)
        change = precise @ change + 2 * precise
    return change.to(q.dtype)


def clip_norm(q: Tensor, radius: float) -> Tensor:
    """Scales each matrix of (…, size, size) down to the Frobenius norm `radius`, if its norm is larger."""
    norm = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
    return q * (radius / norm.clamp(min=radius))


def blocks_apply(x: Tensor, blocks: Tensor, spread: int = 1) -> Tensor:
    """x M'ᵀ for each row of x: M' is block-diagonal, with the halves of its blocks `spread` half-blocks apart.

    Args:
        x: (n, d).
        blocks: (d / b, b, b), or (1, b, b) for the same block everywhere.
        spread: distance of a block's two halves, in half-blocks: block (g, p) acts on the half-blocks 2·spread·g + p and
            2·spread·g + p + spread. 1 for an ordinary block-diagonal matrix; above 1 it needs an even b.
    Returns:
        (n, d).
    """
    b = blocks.shape[-1]
    blocks = blocks.to(x.dtype)
    if spread == 1:
        return _block_product(x.unflatten(1, (-1, b)), blocks).flatten(1)
    halves = x.unflatten(1, (-1, 2, spread, b // 2)).transpose(2, 3)  # (n, groups, spread, 2, b / 2)
    rotated = _block_product(halves.reshape(len(x), -1, b), blocks)
    return rotated.reshape(halves.shape).transpose(2, 3).flatten(1)


def _block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """(n, k, b) times the transposed blocks (k or 1, b, b)."""
    return torch.einsum("nkb,kcb->nkc", x, blocks.expand(x.shape[1], -1, -1))
