"""y + B (A x): the two steps of a low-rank update, with minimal memory and passes over features.

Equivalent to torch's operations, but saves three passes over a layer's features: the product is accumulated into y, B's gradient
is computed in the layout that is fast for a small r, and x's gradients are summed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F


class _Project(torch.autograd.Function):
    """A x. Saves x only for A's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down)
        return F.linear(x, down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, down = ctx.saved_tensors
        g = grads[0].reshape(-1, len(down))
        to_down = None if x is None else g.mT @ x.reshape(-1, x.shape[-1])
        if not ctx.needs_input_grad[0]:
            return None, to_down
        if torch.is_grad_enabled():  # double backward
            return (g @ down).view(ctx.shape), to_down
        to_x = g.new_empty(ctx.shape)  # not a view of a product, into which autograd does not accumulate in place
        torch.mm(g, down, out=to_x.view(-1, ctx.shape[-1]))
        return to_x, to_down


class _AddProduct(torch.autograd.Function):
    """y + B z: features are last in y (n, d_out) and z (n, r), or second in y (batch, d_out, size) and z (batch, r, size)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, up: Tensor, over: bool) -> Tensor:
        ctx.save_for_backward(z, up)
        target = output_buffer(y, over)
        return target.addmm_(z, up.mT) if y.ndim == 2 else target.baddbmm_(up.expand(len(y), -1, -1), z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, up = ctx.saved_tensors
        _, low, factor, _ = ctx.needs_input_grad
        (g,) = grads
        if g.ndim == 2:  # zᵀ g instead of gᵀ z, which takes twice as long for a small r
            return g, g @ up if low else None, (z.mT @ g).mT if factor else None, None
        return g, up.mT @ g if low else None, (z @ g.mT).sum(0).mT if factor else None, None


def output_buffer(y: Tensor, over: bool) -> Tensor:
    """The tensor into which a sum with y is written: y's own memory, or a copy."""
    if not over:
        return y.clone()
    if not y.is_inference():
        increment_version(y)  # autograd raises an error if y was saved for a backward pass
    return y.data


def project(x: Tensor, down: Tensor) -> Tensor:
    """A x.

    Args:
        x: (…, d_in). down: A, (r, d_in).
    Returns:
        (…, r).
    """
    if needs_plain_ops(x, down):
        return F.linear(x, down)
    low: Tensor = _Project.apply(x, down)
    return low


def add_product(y: Tensor, z: Tensor, up: Tensor, over: bool = False) -> Tensor:
    """y + B z.

    Args:
        y: (…, d_out), or (batch, d_out, *size) for a kernel.
        z: (…, r) or (batch, r, *size).
        up: B, (d_out, r) or, for a kernel, (d_out, r, *ones).
        over: modifies y in place; y must not be used elsewhere. If y was saved for a backward pass, that pass raises an error.
    """
    kernel = up.ndim > 2
    product = up.flatten(1)
    if needs_plain_ops(y, z, up):
        return y + ((product @ z.flatten(2)).reshape(y.shape) if kernel else F.linear(z, product))
    flat = [t.flatten(2) if kernel else t.reshape(-1, t.shape[-1]) for t in (y, z)]
    total: Tensor = _AddProduct.apply(*flat, product, over)
    return total.view(y.shape)


def needs_plain_ops(*tensors: Tensor) -> bool:
    """True if torch's own operations must be used: when compiling, in function transforms, under autocast, with mixed dtypes."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled(tensors[0].device.type)
        or len({t.dtype for t in tensors}) > 1
    )
