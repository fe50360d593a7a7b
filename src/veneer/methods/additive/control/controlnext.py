"""ControlNeXt: a small convolutional network whose normalized feature is added near the UNet's first block."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from veneer.injection.adapter_forms import Residuals
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.seams.residual_seam import image_for
from veneer.injection.sites import Port, ResidualSite, Site

from ._control import Controlled

TIME, STEM, WIDTHS, GROUPS = 128, 64, (128, 256), (4, 8)
OLD_STEM = (
    "controlnext with place='stem' of revision 1 added its feature to the first skip feature as well, which the authors' SDXL "
    "model does not; revision 2 does not compute that function. Train it again, or load it with the veneer that wrote it."
)


@dataclass(frozen=True)
class ControlNeXt(Controlled):
    """x' = x + s·CN(f(c, t)) with CN(f) = (f − mean f) / std f · std x + mean x, over channels and pixels of each sample.

    f is a stem of three convolutions, two residual blocks with time embedding, each followed by downsampling, and a convolution
    to the width of x, the output of the UNet's first block. Used with `condition(image=…, strength=…, start=…, end=…)`. The
    authors also train the output projections of all attentions, at a tenth of the learning rate: `train=("attn.out",
    "xattn.out")`.

    Args:
        channels: channels of the control image.
        place: `block`, the first block's output, f resized to x before CN, as for SD 1.5; or `stem`, the first block's input, f
            resized after CN, as the authors do for SDXL. Neither changes a skip feature: the first one, the output of the first
            convolution, is stored before f is added.
    Cross normalization gives f the statistics of x from the first step on, so that a new ControlNeXt does change the output.
    Counts: 3,526,400 for SD 1.5; with the output projections 28.3 M.
    Saved files: revision 1 with `place="stem"` also added f to the first skip feature; such files are rejected: train again.
    Source: Peng et al., arXiv 2408.06070, equation 5 and the sizes of its code. std divides by n − 1, as there.
    """

    name: ClassVar[str] = "controlnext"
    uses: ClassVar[tuple[str, ...]] = ("control",)
    paper: ClassVar[str] = "Peng et al., ControlNeXt: Powerful and Efficient Control for Image and Video Generation, 2024"
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-5
    revision: ClassVar[int] = 2

    channels: int = 3
    place: Literal["block", "stem"] = "block"

    def __post_init__(self) -> None:
        if self.place not in ("block", "stem") or self.channels < 1:
            message = f"controlnext: place must be block or stem and channels at least 1, got {self.place!r}, {self.channels}"
            option = "channels" if self.channels < 1 else "place"
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option))

    def build(self, site: ResidualSite) -> ControlNeXtAdapter:
        """The network, with the output width of the tensor it is added to."""
        return ControlNeXtAdapter(site, self.channels, self.place)

    @classmethod
    def migrate(cls, config: Mapping[str, Any], revision: int, tensors: Collection[str]) -> dict[str, Any]:
        """The options unchanged, except `place="stem"` of revision 1.

        Raises:
            ValueError: a file of revision 1 with `place="stem"`.
        """
        if revision < 2 and config.get("place") == "stem":
            raise OptionError(OLD_STEM, option="place", method=cls.name, given=revision, expected=cls.revision)
        return dict(config)

    def groups(self, adapters: Iterable[tuple[Site, Adapter]]) -> list[dict[str, Any]]:
        """Ten times the run's learning rate, which applies to the base weights."""
        return [{**group, "lr_scale": 10.0} for group in super().groups(adapters)]


class ControlNeXtAdapter(Adapter):
    """f, under its authors' names."""

    def __init__(self, site: ResidualSite, channels: int, place: str) -> None:
        super().__init__()
        from diffusers.models.downsampling import Downsample2D
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.resnet import ResnetBlock2D

        self.site, self.first_pooled = site, place == "block"
        self.place = Port(site.first, "out" if place == "block" else "in")
        self.time_proj = Timesteps(TIME, True, 0)
        self.time_embedding = TimestepEmbedding(TIME, 2 * TIME)
        stem = zip((channels, STEM, STEM), (STEM, STEM, 2 * STEM), (2, 1, 1), strict=True)
        self.embedding = nn.Sequential(*(layer for sizes in stem for layer in _conv_norm_relu(*sizes)))
        ins = (2 * STEM, *WIDTHS[:-1])
        self.down_res = nn.ModuleList(
            ResnetBlock2D(in_channels=a, out_channels=b, temb_channels=2 * TIME, groups=g)
            for a, b, g in zip(ins, WIDTHS, GROUPS, strict=True)
        )
        self.down_sample = nn.ModuleList(Downsample2D(w, use_conv=True, out_channels=w, padding=1, name="op") for w in WIDTHS)
        last = WIDTHS[-1]
        refine = nn.Sequential(
            nn.Conv2d(last, last, 3, padding=1), nn.ReLU(), nn.GroupNorm(8, last), nn.Conv2d(last, last, 3, padding=1),
            nn.GroupNorm(8, last),
        )  # fmt: skip
        self.mid_convs = nn.ModuleList([refine, nn.Conv2d(last, site.widths[0], 1)])

    def feature(self, image: Tensor, timestep: Tensor) -> Tensor:
        """f(c, t): (batch, channels, height, width) to (batch, widths[0], height / 8, width / 8)."""
        time = self.time_embedding(self.time_proj(timestep.expand(len(image))).to(image.dtype))
        x = self.embedding(image)
        for block, halve in zip(self.down_res, self.down_sample, strict=True):
            x = halve(block(x, time))
        refine, widen = self.mid_convs
        found: Tensor = widen(refine(x) + x)
        return found

    def residuals(self, call: Mapping[str, Any]) -> Residuals:
        """None: f is stored until the first block runs."""
        image = image_for(call, self.site, self.conditions, "controlnext")
        dtype = next(self.parameters()).dtype
        timestep = torch.as_tensor(call[self.site.arguments[1]], device=image.device)
        self.call.prepared = self.feature(image.to(dtype), timestep)
        return Residuals()

    def change(self, features: Tensor) -> Tensor:
        """CN(f) for x."""
        control: Tensor = self.call.prepared
        x = features.to(control.dtype)
        height, width = x.shape[-2:]
        if self.first_pooled:
            return cross_normalize(adaptive_avg_pool2d(control, (height, width)), x)
        return adaptive_avg_pool2d(cross_normalize(control, x), (height, width))


def cross_normalize(control: Tensor, x: Tensor) -> Tensor:
    """Cross normalization: control with the mean and the standard deviation of x, per sample."""
    over = (1, 2, 3)
    scale = x.std(over, keepdim=True) / (control.std(over, keepdim=True) + 1e-12)
    return (control - control.mean(over, keepdim=True)) * scale + x.mean(over, keepdim=True)


def _conv_norm_relu(before: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(2, width), nn.ReLU()]
