"""W x for a weight of any kind of layer: a matrix product or a convolution, by the weight's dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        stride, padding, dilation, groups: geometry of the convolution; empty for strides of 1 and no padding.
    """
    if weight.ndim == 2:
        return F.linear(x, weight)
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return conv(x, weight, None, stride or 1, padding or 0, dilation or 1, groups)
