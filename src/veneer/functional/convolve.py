"""W x for a weight of any kind of layer: a matrix product or a convolution, by the weight's dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int] = (),
    padding: Sequence[int] | str = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
) -> Tensor:
    """W x, without a bias.

    Args:
        x: (…, d_in) for a matrix, (batch, d_in, *size) for a kernel.
        weight: (d_out, d_in) or (d_out, d_in / groups, *kernel) with 1 to 3 kernel dimensions.
        stride, padding, dilation, groups: geometry of the convolution; empty for strides of 1 and no padding. The padding "same"
            is TensorFlow's with strides: as many outputs as x has strides, an odd zero last.
    """
    if weight.ndim == 2:
        return F.linear(x, weight)
    if padding == "same" and max(stride or (1,)) > 1:
        x, padding = F.pad(x, same_padding(x.shape[2:], weight.shape[2:], stride, dilation)), ()
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return conv(x, weight, None, stride or 1, padding or 0, dilation or 1, groups)


def same_padding(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = ()) -> list[int]:
    """Zeros before and after, for `F.pad`: last dimension first, which needs ⌈size / stride⌉ outputs.

    >>> same_padding((8, 7), (3, 3), (2, 2))
    [1, 1, 0, 1]
    """
    pads: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation or (1,) * len(kernel), strict=True):
        missing = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads = [missing // 2, missing - missing // 2, *pads]
    return pads


def laid_as(x: Tensor, y: Tensor) -> Tensor:
    """x with its channels last in memory where y's are: what follows then computes as it does on y, to the bit.

    Args:
        x, y: of one shape.
    """
    last = y.ndim == 4 and not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if last else x
