"""(B1 A1) ∘ (B2 A2): the elementwise product of two low-rank matrices, as a matrix and as factors of rank r²."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


class _Hadamard(torch.autograd.Function):
    """Saves only the four factors for the backward pass and recomputes both products there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        return (up1 @ down1) * (up2 @ down2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Factors, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Factors:
        up1, down1, up2, down2 = ctx.saved_tensors
        first = grads[0] * (up2 @ down2)
        second = grads[0] * (up1 @ down1)
        return first @ down1.mT, up1.mT @ first, second @ down2.mT, up2.mT @ second


def hadamard(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
    """(B1 A1) ∘ (B2 A2), whose backward pass stores neither of the two products.

    When compiling, uses the plain product, because the compiler decides what to store.

    Args:
        up1, up2: B, (d_out, r). down1, down2: A, (r, d_in).
    Returns:
        (d_out, d_in).
    """
    if torch.compiler.is_compiling():
        return (up1 @ down1) * (up2 @ down2)
    product: Tensor = _Hadamard.apply(up1, down1, up2, down2)
    return product


def hadamard_pair(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> tuple[Tensor, Tensor]:
    """The same matrix as one product B A of rank r²: B[o, (p, q)] = B1[o, p] B2[o, q] and A[(p, q), i] = A1[p, i] A2[q, i].

    Returns:
        B (d_out, r²) and A (r², d_in, …), for `down1` and `down2` of shape (r, d_in, …).
    """
    up = (up1.unsqueeze(2) * up2.unsqueeze(1)).flatten(1)
    down = (down1.unsqueeze(1) * down2.unsqueeze(0)).flatten(0, 1)
    return up, down
