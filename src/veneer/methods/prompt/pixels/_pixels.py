"""Parts shared by pixel prompts: the border around an image, and normalized images."""

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

SIDE = 224  # image size that options refer to


def scale_pixels(length: int, part: int) -> int:
    """Scales `part` pixels of 224 to a side of `length` pixels; at least one."""
    return max(1, round(length * part / SIDE))


@dataclass(frozen=True)
class Border:
    """The pixels of a field `outer` (H, W) around a centered field `inner` (h, w).

    If H − h is odd, the extra row is at the top; if W − w is odd, the extra column is on the left.
    """

    outer: tuple[int, int]
    inner: tuple[int, int]

    def __post_init__(self) -> None:
        if self.inner == self.outer or any(not 0 < i <= o for i, o in zip(self.inner, self.outer, strict=True)):
            message = f"a field of {self.inner} pixels in one of {self.outer} leaves no border"
            raise OptionError(message, option="border", given=self.inner, expected=self.outer)

    @property
    def pixels(self) -> int:
        """H·W − h·w."""
        (height, width), (h, w) = self.outer, self.inner
        return height * width - h * w

    def around(self, border: Tensor, middle: Tensor) -> Tensor:
        """border (…, `pixels`): top, left, right, bottom, each row by row; middle (…, h, w). Returns (…, H, W)."""
        (height, width), (h, w) = self.outer, self.inner
        up, left = (height - h + 1) // 2, (width - w + 1) // 2
        down, right = height - h - up, width - w - left
        above, before, behind, below = border.split([up * width, h * left, h * right, down * width], -1)
        row = torch.cat([before.unflatten(-1, (h, left)), middle, behind.unflatten(-1, (h, right))], -1)
        return torch.cat([above.unflatten(-1, (up, width)), row, below.unflatten(-1, (down, width))], -2)


def resize(pictures: Tensor, size: Sequence[int], mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """(B, C, …) resized with antialiasing; unchanged if the size is equal. Linear, so independent of normalization."""
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    return F.interpolate(pictures, tuple(size), mode=mode, antialias=True)


class PixelAdapter(Adapter):
    """Changes images before the model. `mean`, `std`: (C, 1), of the model's normalization."""

    mean: Tensor
    std: Tensor

    def __init__(self, site: PixelSite, border: Border) -> None:
        super().__init__()
        channels = site.size[2]
        if not len(site.mean) == len(site.std) == channels:
            raise OptionError(
                f"mean {site.mean} and std {site.std} of the model do not match its {channels} channels; expected one "
                "value per channel in pretrained_cfg",
                option="mean",
                where=site.name,
                given=(len(site.mean), len(site.std)),
                expected=channels,
            )
        self.border = border
        self.register_buffer("mean", torch.tensor(site.mean).unsqueeze(1), persistent=False)
        self.register_buffer("std", torch.tensor(site.std).unsqueeze(1), persistent=False)

    def normalize_pixels(self, values: Tensor) -> Tensor:
        """Pixels (C, n) in [0, 1], normalized as the model expects."""
        return (values - self.mean) / self.std
