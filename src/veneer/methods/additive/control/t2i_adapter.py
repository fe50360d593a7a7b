"""T2I-Adapter: image features, computed once per generated image, that are added inside a UNet's encoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from veneer.injection.adapter_forms import Residuals
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.seams.residual_seam import image_for
from veneer.injection.sites import ResidualSite

from ._control import Controlled


@dataclass(frozen=True)
class T2IAdapter(Controlled):
    """F_i' = F_i + A_i(c): the features A_i of the image c are added to the UNet's at every resolution of its encoder.

    c is pixel-unshuffled to the first resolution; each level downsamples where the UNet does, changes the width by a 1×1
    convolution, and has `blocks` residual blocks h + W2·relu(W1 * h). `light` levels do this at a quarter of the width. The
    UNet's time and text embeddings are not used. Used with `condition(image=…, strength=…, start=…, end=…)`.

    Args:
        kind: architecture, `full` or `light`. `channels`: channels of the control image.
        blocks: residual blocks per level; 0 for the default, 2 (full) or 4 (light).
        zero_start: initialize as the identity: zeros in the first convolution (full) or the last of each level (light), and in
            the last of every residual block. False: torch's default initialization, as in the paper.
    Counts: full 77,369,280 (SD 1.5) and 79,028,160 (SDXL); light 18,689,200, for SD 1.5.
    Source: Mou et al., AAAI 2024, section 3.2, and the sizes of its code. Deviation: `zero_start`.
    """

    name: ClassVar[str] = "t2i_adapter"
    uses: ClassVar[tuple[str, ...]] = ("control",)
    paper: ClassVar[str] = "Mou et al., T2I-Adapter: Learning Adapters to Dig out More Controllable Ability, AAAI 2024"
    learning_rate: ClassVar[float] = 1e-5

    kind: Literal["full", "light"] = "full"
    channels: int = 3
    blocks: int = 0
    zero_start: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("full", "light"):
            raise OptionError.of("t2i_adapter", "kind", self.kind, "full or light")
        if self.channels < 1 or self.blocks < 0:
            message = f"t2i_adapter: channels at least 1 and blocks at least 0, got {self.channels} and {self.blocks}"
            option = "channels" if self.channels < 1 else "blocks"
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option))

    def build(self, site: ResidualSite) -> T2IAdapterModule:
        """One level for each of the site's inner features."""
        return T2IAdapterModule(self, site)

    def count(self, site: ResidualSite) -> int:
        """Full: first convolution, width changes, 10·C² + 2·C per block. Light: two 1×1 layers, 18·(C/4)² + C/2 per block."""
        widths, first = site.inner_widths, site.pixels * site.inner_strides[0]
        blocks, before, total = self.blocks or DEFAULT_BLOCKS[self.kind], self.channels * first * first, 0
        if self.kind == "full":
            total, before = 9 * before * widths[0] + widths[0], widths[0]
        for width in widths:
            if self.kind == "full":
                total += (before * width + width) * (before != width) + blocks * (10 * width * width + 2 * width)
            else:
                thin = width // 4
                total += before * thin + thin + blocks * (18 * thin * thin + 2 * thin) + thin * width + width
            before = width
        return total


DEFAULT_BLOCKS = {"full": 2, "light": 4}


class T2IAdapterModule(Adapter):
    """The levels, under their authors' names."""

    def __init__(self, method: T2IAdapter, site: ResidualSite) -> None:
        super().__init__()
        self.site = site
        widths, strides = site.inner_widths, site.inner_strides
        light, blocks = method.kind == "light", method.blocks or DEFAULT_BLOCKS[method.kind]
        self.unshuffle = nn.PixelUnshuffle(site.pixels * strides[0])
        before = method.channels * (site.pixels * strides[0]) ** 2
        if not light:
            self.conv_in = nn.Conv2d(before, widths[0], 3, padding=1)
            before = widths[0]
        level = LightLevel if light else FullLevel
        ins, halves = (before, *widths[:-1]), (False, *(a != b for a, b in itertools.pairwise(strides)))
        self.body = nn.ModuleList(level(*sizes, blocks) for sizes in zip(ins, widths, halves, strict=True))
        if method.zero_start:
            self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        """Zeros the convolutions at the start or end of the features, so that the image has no effect."""
        for name, p in self.named_parameters():
            light = not hasattr(self, "conv_in")
            ends = (".out_conv.",) if light else ("conv_in.", "block2.", "in_conv.bias")
            if any(part in name for part in ends) or name.startswith("conv_in."):
                p.zero_()

    def features(self, image: Tensor) -> list[Tensor]:
        """A_i(c), level by level."""
        x = self.unshuffle(image)
        if hasattr(self, "conv_in"):
            x = self.conv_in(x)
        found = []
        for level in self.body:
            x = level(x)
            found.append(x)
        return found

    def residuals(self, call: Mapping[str, Any]) -> Residuals:
        """The features, which are the same for all sampling steps."""
        image = image_for(call, self.site, self.conditions, "t2i_adapter")
        dtype = next(self.parameters()).dtype
        return Residuals(inner=self.conditions.cached(self, lambda: self.features(image.to(dtype))))


class ResidualBlock(nn.Module):
    """h + W2·relu(W1 * h), W1 of 3×3 and W2 of `kernel`."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width) to the same shape."""
        update: Tensor = self.block2(relu(self.block1(x)))
        return x + update


class FullLevel(nn.Module):
    """A level of the full adapter."""

    def __init__(self, before: int, width: int, halves: bool, blocks: int) -> None:
        super().__init__()
        self.reduce = nn.AvgPool2d(2, ceil_mode=True) if halves else nn.Identity()
        self.in_conv = nn.Conv2d(before, width, 1) if before != width else None
        self.resnets = nn.Sequential(*(ResidualBlock(width, 1) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Downsamples, changes the width, refines."""
        x = self.reduce(x)
        found: Tensor = self.resnets(x if self.in_conv is None else self.in_conv(x))
        return found


class LightLevel(nn.Module):
    """A level of the light adapter, at a quarter of the width."""

    def __init__(self, before: int, width: int, halves: bool, blocks: int) -> None:
        super().__init__()
        self.reduce = nn.AvgPool2d(2, ceil_mode=True) if halves else nn.Identity()
        self.in_conv = nn.Conv2d(before, width // 4, 1)
        self.resnets = nn.Sequential(*(ResidualBlock(width // 4, 3) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Downsamples, refines at a quarter of the width, restores the width."""
        found: Tensor = self.out_conv(self.resnets(self.in_conv(self.reduce(x))))
        return found
