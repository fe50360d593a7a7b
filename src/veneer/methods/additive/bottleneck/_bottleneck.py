"""Parts shared by the bottleneck adapters: down-projection, nonlinearity, up-projection, residual sum."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.channels import add_channels_product, channels_product, drop_path_mask
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.sites import BranchSite, StreamSite

Activation = Literal["relu", "gelu", "quick_gelu"]


def activate(z: Tensor, act: Activation) -> Tensor:
    """The activation with the given name; `quick_gelu` is z ∘ sigmoid(1.702 z)."""
    if act == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.relu(z) if act == "relu" else F.gelu(z)


class Bottleneck(Adapter):
    """y' = y + s·Up(Drop(act(Down(x)))). Shapes: `down` (h, width), `up` (width, h), `down_bias` (h,), `up_bias` (width,).

    All parameters are initialized to zero except `down`, which the method initializes. Scales are folded into the small `up`
    matrix, which saves passes over the features.
    """

    applies_strength: ClassVar[bool] = True
    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(
        self,
        site: BranchSite | StreamSite,
        bottleneck: int,
        act: Activation,
        scale: float = 1.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.site, self.act, self.scale, self.dropout, self.drop_path = site, act, scale, dropout, drop_path
        self.down = nn.Parameter(torch.empty(bottleneck, site.width))
        self.up = nn.Parameter(zeros(site.width, bottleneck))
        self.down_bias = nn.Parameter(zeros(bottleneck)) if bias else None
        self.up_bias = nn.Parameter(zeros(site.width)) if bias else None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the adapter's input and the tensor it is added to, both in the site's layout."""
        layout = self.site.layout
        z = self.between(channels_product(x, self.down, self.down_bias, layout))
        kept = drop_path_mask(z, self.drop_path, self.training)
        up, bias = self.last()
        return add_channels_product(y, z if kept is None else z * kept, up, bias, layout, kept)

    def between(self, z: Tensor) -> Tensor:
        """Maps the h bottleneck features."""
        return F.dropout(activate(z, self.act), self.dropout, self.training)

    def last(self) -> tuple[Tensor, Tensor | None]:
        """The matrix and the bias of Up, with all scales and the strength folded in."""
        factor = self.strength * self.scale
        return self.up * factor, None if self.up_bias is None else self.up_bias * factor


class OutputBottleneck(Bottleneck):
    """y' = y + A(y): reads the tensor that it changes."""

    input_port: ClassVar[Literal["write"]] = "write"


def count_bottleneck(width: int, bottleneck: int, bias: bool = True) -> int:
    """Number of parameters in Down and Up."""
    return 2 * width * bottleneck + (bottleneck + width if bias else 0)


def check_bottleneck_options(name: str, bottleneck: int, **probabilities: float) -> None:
    """Raises `ValueError` for a width below 1 or a probability outside [0, 1)."""
    if bottleneck < 1:
        raise OptionError.of(name, "bottleneck", bottleneck, "at least 1")
    for option, value in probabilities.items():
        if not 0 <= value < 1:
            raise OptionError.of(name, option, value, "in [0, 1)")


def truncated_normal_(weight: Tensor, std: float) -> Tensor:
    """Fills `weight` in place from a normal distribution with the given standard deviation, truncated at two of them."""
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
