"""What pixel prompts have in common: the border around a picture, and pictures as the model's normalisation leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.sites import PixelSite

SIDE = 224  # of the pictures that options are told for


def scaled(length: int, part: int) -> int:
    """`part` pixels of 224, in a side of `length` pixels; at least one."""
    return max(1, round(length * part / SIDE))


@dataclass(frozen=True)
class Border:
    """The pixels of a field `outer` (H, W) around a field `inner` (h, w) in its middle.

    Where H − h is odd, the row more is above; where W − w is, the column more is on the left.
    """

    outer: tuple[int, int]
    inner: tuple[int, int]

    def __post_init__(self) -> None:
        if self.inner == self.outer or any(not 0 < i <= o for i, o in zip(self.inner, self.outer, strict=True)):
            message = f"a field of {self.inner} pixels in one of {self.outer} leaves no border around it"
            raise OptionError(message, option="border", given=self.inner, expected=self.outer)

    @property
    def pixels(self) -> int:
        """H·W − h·w."""
        (height, width), (h, w) = self.outer, self.inner
        return height * width - h * w

    def around(self, border: Tensor, middle: Tensor) -> Tensor:
        """border (…, `pixels`): above, left, right, below, each row by row; middle (…, h, w). Gives (…, H, W)."""
        (height, width), (h, w) = self.outer, self.inner
        up, left = (height - h + 1) // 2, (width - w + 1) // 2
        down, right = height - h - up, width - w - left
        above, before, behind, below = border.split([up * width, h * left, h * right, down * width], -1)
        row = torch.cat([before.unflatten(-1, (h, left)), middle, behind.unflatten(-1, (h, right))], -1)
        return torch.cat([above.unflatten(-1, (up, width)), row, below.unflatten(-1, (down, width))], -2)


def resized(pictures: Tensor, size: Sequence[int], mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """(B, C, …) at another size, antialiased; as they are where they have it. A mean does not see an affine normalisation."""
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    return F.interpolate(pictures, tuple(size), mode=mode, antialias=True)


class PixelAdapter(Adapter):
    """Changes pictures in front of the model. `mean`, `std`: (C, 1), of the model's normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, site: PixelSite, border: Border) -> None:
        super().__init__()
        channels = site.size[2]
        if not len(site.mean) == len(site.std) == channels:
            raise OptionError(
                f"mean {site.mean} and std {site.std} of the model's pictures are not for its {channels} channels; expected one "
                "number a channel in pretrained_cfg",
                option="mean",
                where=site.name,
                given=(len(site.mean), len(site.std)),
                expected=channels,
            )
        self.border = border
        self.register_buffer("mean", torch.tensor(site.mean).unsqueeze(1), persistent=False)
        self.register_buffer("std", torch.tensor(site.std).unsqueeze(1), persistent=False)

    def normal(self, values: Tensor) -> Tensor:
        """Pixels (C, n) in [0, 1] as the model gets them."""
        return (values - self.mean) / self.std
