"""W x for linear and convolutional weights: a matrix product or a convolution, by the weight's dimensions."""

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
        stride, padding, dilation, groups: geometry of the convolution; empty for stride 1 and no padding. The padding "same"
            follows TensorFlow for strides: ⌈size / stride⌉ outputs, an odd zero at the end.
    """
    if weight.ndim == 2:
        return F.linear(x, weight)
    if padding == "same" and max(stride or (1,)) > 1:
        x, padding = F.pad(x, same_padding(x.shape[2:], weight.shape[2:], stride, dilation)), ()
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return conv(x, weight, None, stride or 1, padding or 0, dilation or 1, groups)


def same_padding(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = ()) -> list[int]:
    """Padding before and after, for `F.pad`, last dimension first, that gives ⌈size / stride⌉ outputs.

    >>> same_padding((8, 7), (3, 3), (2, 2))
    [1, 1, 0, 1]
    """
    pads: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation or (1,) * len(kernel), strict=True):
        missing = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads = [missing // 2, missing - missing // 2, *pads]
    return pads


def match_memory_format(x: Tensor, y: Tensor) -> Tensor:
    """x in channels-last memory format if y is in it, so that later operations are bitwise those on y.

    Args:
        x, y: of the same shape.
    """
    last = y.ndim == 4 and not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if last else x
