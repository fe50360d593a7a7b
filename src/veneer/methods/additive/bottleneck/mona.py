"""Mona: a bottleneck with convolutions of three sizes, after the attention and after the MLP of every block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite

from ._bottleneck import Bottleneck, check_bottleneck_options, count_bottleneck
from ._patch_grid import convolve_patches

Init = Literal["normal", "zero"]
KERNELS = (3, 5, 7)


class MonaAdapter(Bottleneck):
    """y' = y + Up(Drop(GELU(Conv(Down(c ∘ LN(z) + e ∘ z))))), z = x + y the stream after the branch.

    Shapes: `norm_weight`, `norm_bias`, `norm_scale` (c), `stream_scale` (e) (width,); `conv3`, `conv5`, `conv7` (h, 1, k, k) and
    `pointwise` (h, h, 1, 1), each with a bias (h,).
    """

    site: BranchSite

    def __init__(self, site: BranchSite, bottleneck: int, dropout: float) -> None:
        super().__init__(site, bottleneck, "gelu", dropout=dropout)
        self.norm_weight = nn.Parameter(torch.ones(site.width))
        self.norm_bias = nn.Parameter(torch.zeros(site.width))
        self.norm_scale = nn.Parameter(torch.full((site.width,), 1e-6))
        self.stream_scale = nn.Parameter(torch.ones(site.width))
        for size in KERNELS:
            self.register_parameter(f"conv{size}", nn.Parameter(torch.empty(bottleneck, 1, size, size)))
            self.register_parameter(f"conv{size}_bias", nn.Parameter(torch.empty(bottleneck)))
        self.pointwise = nn.Parameter(torch.empty(bottleneck, bottleneck, 1, 1))
        self.pointwise_bias = nn.Parameter(torch.empty(bottleneck))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the stream before the branch; y: the branch."""
        return super().output(self._scaled(x + y), y)

    def between(self, z: Tensor) -> Tensor:
        """The convolutions, GELU and dropout."""
        return super().between(convolve_patches(self._convolved, z, self.site))

    def _scaled(self, z: Tensor) -> Tensor:
        """c ∘ LN(z) + e ∘ z, over the channels; both scales in one product and one sum for each."""
        channels_first = self.site.layout == "NCHW"
        last = z.movedim(1, -1) if channels_first else z
        weight, bias = self.norm_weight * self.norm_scale, self.norm_bias * self.norm_scale
        scaled = F.layer_norm(last, last.shape[-1:], weight, bias) + last * self.stream_scale
        return scaled.movedim(-1, 1) if channels_first else scaled

    def _convolved(self, z: Tensor) -> Tensor:
        """v + P v with v = z + (K3 z + K5 z + K7 z) / 3, for (batch, h, height, width)."""
        kernels = [(getattr(self, f"conv{size}"), getattr(self, f"conv{size}_bias"), size // 2) for size in KERNELS]
        mean = sum(F.conv2d(z, weight, bias, padding=pad, groups=len(weight)) for weight, bias, pad in kernels) / len(KERNELS)
        v = z + mean
        return v + F.conv2d(v, self.pointwise, self.pointwise_bias)


@dataclass(frozen=True)
class Mona(Method):
    """y' = y + Up(Drop(GELU(Conv(Down(c ∘ LN(z) + e ∘ z))))): y attention or MLP branch, z = x + y the stream after it.

    Conv(u) = v + P v with v = u + (K3 u + K5 u + K7 u) / 3: depthwise convolutions of the patch grid with 3×3, 5×5 and 7×7
    kernels, zero-padded, and a 1×1 convolution P. Each class or register token is treated as a 1×1 image. LN is a trained layer
    norm; c and e are scales per channel, 1e-6 and 1 initially.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        dropout: probability of dropping one of the h features in training, 0 to 1.
        init: initialization of Up: `normal` as Down, or `zero`, with which a new adapter leaves the output unchanged.
    Counts: 2·width·h + h + width + 83·h + 3·h + h² + h + 4·width per branch; ViT-B/16 2,684,928, Swin-B 3,667,456.
    Source: Yin et al., 5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks, CVPR 2025, and the
    authors' code: Down and Up normal with 0.02, their biases zero; convolutions with torch's initialization. Deviations: the
    authors adapt Swin alone, without class tokens, and always have 64 features; if a host has a gate after the branch, z is taken
    before the gate.
    Raises:
        HostChanged: in a forward pass, if the patches form no grid of the model's aspect ratio.
    """

    name: ClassVar[str] = "mona"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Yin et al., 5%>100%: Breaking Performance Shackles of Full Fine-Tuning, CVPR 2025"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(BranchSite, where={"layout": "NLC", "grid": ...}),
        Need(BranchSite, where={"layout": ("NHWC", "NCHW")}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4

    bottleneck: int = 64
    dropout: float = 0.1
    init: Init = "normal"

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck, dropout=self.dropout)
        if self.init not in get_args(Init):
            raise OptionError.of(self.name, "init", self.init, f"one of {', '.join(get_args(Init))}")

    def build(self, site: BranchSite) -> MonaAdapter:
        """Down, the convolutions and Up for one branch."""
        adapter = MonaAdapter(site, self.bottleneck, self.dropout)
        for weight in (adapter.down, adapter.up) if self.init == "normal" else (adapter.down,):
            nn.init.trunc_normal_(weight, std=0.02)
        for name in (*(f"conv{size}" for size in KERNELS), "pointwise"):
            weight = adapter.get_parameter(name)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(adapter.get_parameter(f"{name}_bias"), -bound, bound)
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·width·h + h + width + 83·h + 3·h + h² + h + 4·width."""
        h = self.bottleneck
        kernels = sum(size**2 for size in KERNELS) + len(KERNELS)
        return count_bottleneck(site.width, h) + kernels * h + h * h + h + 4 * site.width
