"""Convpass: a bottleneck with a convolution over the patches, parallel to attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite

from ._bottleneck import Bottleneck, activate, check_bottleneck_options, count_bottleneck
from ._patch_grid import convolve_patches

Init = Literal["identity", "xavier"]


class ConvpassAdapter(Bottleneck):
    """y' = y + s·Up(Drop(act(conv(act(Down(x)))))) with x after the norm. Shapes: `conv` (h, h, 3, 3), `conv_bias` (h,)."""

    input_port: ClassVar[Literal["normed"]] = "normed"
    site: BranchSite

    def __init__(self, site: BranchSite, bottleneck: int, scale: float, dropout: float, drop_path: float) -> None:
        super().__init__(site, bottleneck, "quick_gelu", scale, dropout, drop_path)
        self.conv = nn.Parameter(zeros(bottleneck, bottleneck, 3, 3))
        self.conv_bias = nn.Parameter(zeros(bottleneck))

    def between(self, z: Tensor) -> Tensor:
        """The activation, the convolution, the activation."""
        return super().between(convolve_patches(self._convolved, activate(z, self.act), self.site, self._center))

    def _convolved(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.conv, self.conv_bias, padding=1)

    def _center(self, z: Tensor) -> Tensor:
        """Of prefix tokens: an image of one pixel meets only the center of the kernel."""
        return F.linear(z, self.conv[:, :, 1, 1], self.conv_bias)


@dataclass(frozen=True)
class Convpass(Method):
    """y' = y + s·Up(Drop(act(conv(act(Down(x)))))): y attention or MLP branch, x its input after the norm; Up is zero initially.

    act is QuickGELU, conv a 3×3 convolution over the patch grid, zero-padded. Each class or register token is treated as a 1×1
    image. Images of another size have a grid of the same aspect ratio.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        scale: s, fixed; the authors select it per dataset from 0.01, 0.1, 1, 10, 100.
        dropout: probability of dropping one of the h features in training, 0 to 1.
        drop_path: probability of dropping the adapter for a sample in training, 0 to 1.
        init: initialization of conv: `identity` (the center passes each feature on) or `xavier`.
    Counts: 2·width·h + h + width + 9·h² + h per branch; ViT-B/16 327,552 with h = 8, and 163,776 with `where="attn"`.
    Source: Jie, Deng, Convolutional Bypasses Are Better Vision Transformer Adapters, 2022 (arXiv 2207.07039), and the
    authors' code; Down Xavier-uniform, biases zero. Deviations: the authors' bypass is inside the host's stochastic depth, here
    it has its own, 0 by default; the grid is that of the input, not 14 × 14; branches without a preceding norm are not
    supported.
    Raises:
        HostChanged: in a forward pass, if the patches form no grid of the model's aspect ratio.
    """

    name: ClassVar[str] = "convpass"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Jie, Deng, Convolutional Bypasses Are Better Vision Transformer Adapters, 2022"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(BranchSite, where={"normed": ..., "layout": "NLC", "grid": ...}),
        Need(BranchSite, where={"normed": ..., "layout": ("NHWC", "NCHW")}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    drop_path: float = 0.0
    init: Init = "identity"

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck, dropout=self.dropout, drop_path=self.drop_path)
        if self.init not in get_args(Init):
            raise OptionError.of("convpass", "init", self.init, f"one of {', '.join(get_args(Init))}")

    def build(self, site: BranchSite) -> ConvpassAdapter:
        """Down, conv and Up for one branch."""
        adapter = ConvpassAdapter(site, self.bottleneck, self.scale, self.dropout, self.drop_path)
        nn.init.xavier_uniform_(adapter.down)
        if self.init == "xavier":
            nn.init.xavier_uniform_(adapter.conv)
        else:
            nn.init.dirac_(adapter.conv)
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·width·h + h + width + 9·h² + h."""
        return count_bottleneck(site.width, self.bottleneck) + 9 * self.bottleneck**2 + self.bottleneck
