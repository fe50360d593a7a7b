"""Quantized linear layers by their sizes: bytes of the packed weights, and what a forward and backward pass allocates and keeps.

A `PackedLinear` computes nothing. It is a model of the library's layer for counts with meta or fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_models.quantization import linear_layers
from veneer.base_models.quantized_linear import KINDS


@dataclass(frozen=True)
class Packing:
    """Memory of the layers of a kind.

    Args:
        stored: bytes of a weight with its scales, from (rows, columns, bytes of a float value).
        workspace: bytes per weight beside the dequantized one while it is dequantized, from the bytes of a float value.
        keeps_weight: the dequantized weight is saved for the backward pass, which takes most of what quantization saves.
        keeps_input: the input is kept until the backward pass, though its frozen weight needs no gradient.
    """

    stored: Callable[[int, int, int], int]
    workspace: Callable[[int], float] = lambda size: 0
    keeps_weight: bool = False
    keeps_input: bool = False


def _four_bits(rows: int, columns: int, size: int) -> int:
    """Packed pairs, a float32 scale per 64 weights and the 16 levels."""
    return -(-rows * columns // 2) + 4 * -(-rows * columns // 64) + 64


def _four_bits_double(rows: int, columns: int, size: int) -> int:
    """Packed pairs, an 8-bit scale per 64 weights, a float32 scale per 256 of these, both tables of levels and the offset."""
    scales = -(-rows * columns // 64)
    return -(-rows * columns // 2) + scales + 4 * -(-scales // 256) + 64 + 1024 + 4


def _quanto_four_bits(rows: int, columns: int, size: int) -> int:
    """Packed pairs, and a scale and a shift per group of at most 128 weights."""
    group = next(width for width in (128, 96, 64, 32, columns) if columns % width == 0)
    return -(-rows * columns // 2) + 2 * size * (rows * columns // group)


PACKINGS: dict[str, Packing] = {
    **{kind: Packing(_four_bits) for kind in ("nf4", "fp4")},
    **{kind: Packing(_four_bits_double) for kind in ("nf4-dq", "fp4-dq")},
    "int8": Packing(lambda rows, columns, size: rows * columns + 4 * rows, keeps_input=True),
    "int8-torchao": Packing(lambda rows, columns, size: rows * columns + 5 * rows, keeps_weight=True),
    "fp8": Packing(lambda rows, columns, size: rows * columns + 4 * rows, lambda size: 8 if size < 4 else 4, keeps_weight=True),
    "int4": Packing(_quanto_four_bits, lambda size: 1.5 + size),
    "int8-quanto": Packing(lambda rows, columns, size: rows * columns + size * rows, lambda size: size),
}
"""Name of a kind to its memory; the names are those of `KINDS`."""


class PackedLinear(nn.Linear):
    """A linear layer with the memory of a quantized one: its weight has the float shape, `stored` is the bytes of the packed one.

    Args:
        linear: the float layer on the meta device. `kind`: name of the kind.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=linear.weight.dtype
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.kind, self.packing = kind, PACKINGS[kind]
        self.stored = self.packing.stored(linear.out_features, linear.in_features, linear.weight.element_size())

    def forward(self, x: Tensor) -> Tensor:
        """The output's shape, with the allocations of the library's layer."""
        output: Tensor = _Multiply.apply(x, self.weight, self.bias, self.packing)
        return output


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
        dequantized = _dequantize(x, weight, packing)
        ctx.packing, ctx.weight, ctx.x = packing, weight, x if packing.keeps_input else None
        ctx.save_for_backward(*([dequantized] if packing.keeps_weight else []))
        return F.linear(x, dequantized, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        (weight,) = ctx.saved_tensors or (_dequantize(gradient, ctx.weight, ctx.packing),)
        return gradient @ weight, None, None, None


def _dequantize(like: Tensor, weight: Tensor, packing: Packing) -> Tensor:
    workspace = like.new_empty(round(packing.workspace(like.element_size()) * weight.numel()), dtype=torch.uint8)
    dequantized = torch.empty(weight.shape, dtype=like.dtype, device=like.device)
    del workspace
    return dequantized


def pack_linears(tower: nn.Module, kind: str) -> None:
    """Replaces the linear layers of a model on the meta device that `kind` quantizes, as `quantize_model` does."""
    for name in list(linear_layers(tower)):
        owner, _, child = name.rpartition(".")
        parent = tower.get_submodule(owner)
        linear: Any = parent._modules[child]
        if linear.in_features % KINDS[kind].block == 0:
            parent._modules[child] = PackedLinear(linear, kind)


def weight_bytes(tower: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model on the meta device, quantized ones packed."""
    packed = {id(m.weight): m.stored for m in tower.modules() if isinstance(m, PackedLinear)}
    tensors = {id(t): t for t in (*tower.parameters(), *tower.buffers())}
    return sum(packed.get(key, t.numel() * t.element_size()) for key, t in tensors.items())
