"""Aspect-ratio buckets: training size and crop of each image.

All sizes are `(height, width)` in pixels. An image is resized to cover its bucket and cropped, so its aspect ratio is kept.
Source: NovelAI, "Improvements on Stable Diffusion" (2022); SDXL (2307.01952, section 2.2) for the micro-conditioning sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .image_io import DataError

Size = tuple[int, int]
Crop = Literal["center", "random"]


@dataclass(frozen=True)
class BucketPlan:
    """Bucket sizes of a run.

    Args:
        resolution: every bucket's area is at most `resolution`², pixels².
        multiple: sides are multiples of this (the family's `multiple`).
        min_side, max_side: bounds of a side, pixels (default: half and twice the resolution).
        square: a single bucket, `resolution` x `resolution`.
        upscale: enlarge images that are smaller than their bucket; if False, a small image gets a bucket of the same size.

    Raises:
        DataError: the resolution is not a multiple of `multiple`, or not within the bounds.
    """

    resolution: int
    multiple: int
    min_side: int | None = None
    max_side: int | None = None
    square: bool = False
    upscale: bool = True

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.resolution < self.multiple or self.resolution % self.multiple:
            low = max(self.resolution // max(1, self.multiple), 1) * max(1, self.multiple)
            near = (low, low + max(1, self.multiple))
            message = f"resolution: {self.resolution} pixels; expected a multiple of {self.multiple}. Use {near[0]} or {near[1]}."
            raise DataError(message, where="resolution", given=self.resolution, expected=near)
        if not self.bounds[0] <= self.resolution <= self.bounds[1]:
            message = f"buckets: sides from {self.bounds[0]} to {self.bounds[1]} exclude the resolution {self.resolution}."
            raise DataError(message, where="bounds", given=self.bounds, expected=self.resolution)

    @property
    def bounds(self) -> tuple[int, int]:
        """Shortest and longest side, as multiples."""
        low = self.min_side if self.min_side is not None else self.resolution // 2
        high = self.max_side if self.max_side is not None else self.resolution * 2
        return max(self.multiple, -(-low // self.multiple) * self.multiple), high // self.multiple * self.multiple

    def sizes(self) -> list[Size]:
        """All buckets, sorted: for each side the longest other side within the area, in both orientations, and the square."""
        found = {(self.resolution, self.resolution)}
        low, high = self.bounds
        for side in range(low, high + 1, self.multiple) if not self.square else ():
            other = min(high, self.resolution**2 // side // self.multiple * self.multiple)
            if other >= low:
                found |= {(side, other), (other, side)}
        return sorted(found)

    def choose(self, size: Size) -> Size:
        """The bucket of an image: the nearest aspect ratio by |log ratio|, which is symmetric in height and width, then the
        larger area."""
        if not self.upscale:
            return self._own(size)
        log_ratio = math.log(size[0] / size[1])
        return min(self.sizes(), key=lambda b: (round(abs(math.log(b[0] / b[1]) - log_ratio), 9), -b[0] * b[1], b))

    def _own(self, size: Size) -> Size:
        """The image's own size, reduced to the area (at least one multiple) and rounded down to multiples."""
        shrink = min(1.0, max(self.resolution / math.sqrt(size[0] * size[1]), self.multiple / min(size)))
        limit = self.resolution if self.square else min(self.bounds[1], self.resolution**2 // self.multiple)
        sides = [min(limit, int(side * shrink + 1e-6) // self.multiple * self.multiple) for side in size]
        if self.square:
            sides = [min(sides)] * 2
        if min(sides) < self.multiple:
            found = f"{size[0]} x {size[1]} pixels (height x width)"
            message = (
                f"buckets: an image of {found} has a side below {self.multiple} pixels. Enable upscaling, or use a larger image."
            )
            raise DataError(message, where="upscale", given=size, expected=self.multiple)
        return sides[0], sides[1]


class Placement(NamedTuple):
    """Position of a crop: in the image resized to `resized`, at `top`, `left`, of size `bucket`, then flipped if `flip`."""

    resized: Size
    bucket: Size
    top: int
    left: int
    flip: bool

    def micro(self, original: Size) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: original h, w; crop top, left; target h, w. In a flipped image, left is counted from the
        right edge."""
        left = self.resized[1] - self.left - self.bucket[1] if self.flip else self.left
        return (*original, self.top, left, *self.bucket)


def covering_size(size: Size, bucket: Size) -> Size:
    """The smallest size of the same aspect ratio that covers the bucket, rounded to whole pixels."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def place_crop(size: Size, bucket: Size, crop: Crop, flip: float, draws: torch.Generator) -> Placement:
    """The crop of one sample. Takes three numbers from the sample's generator `draws`, whatever the options.

    Args:
        flip: probability of horizontal flips, 0 to 1.
    """
    down, across, mirror = torch.rand(3, generator=draws, dtype=torch.float64).tolist()
    resized = covering_size(size, bucket)
    spare = resized[0] - bucket[0], resized[1] - bucket[1]
    if crop == "center":
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = int(down * (spare[0] + 1)), int(across * (spare[1] + 1))
    return Placement(resized, bucket, top, left, mirror < flip)


def visible_share(size: Size, bucket: Size) -> float:
    """Fraction of an image's area that remains after the crop, 0 to 1."""
    resized = covering_size(size, bucket)
    return bucket[0] * bucket[1] / (resized[0] * resized[1])


def count(buckets: Sequence[Size]) -> dict[Size, int]:
    """Number of samples by bucket, largest first."""
    tally = {bucket: buckets.count(bucket) for bucket in set(buckets)}
    return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))
