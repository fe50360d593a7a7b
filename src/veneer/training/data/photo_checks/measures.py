"""Measures of one image: blur, brightness, a perceptual hash, and how much of the subject a crop keeps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy.fft import dctn
from skimage.measure import blur_effect

from ..buckets import Size, covering_size

HASH_BITS = 63
"""Length of `image_hash`."""
_KERNEL = 7
_FLAT = 0.02
"""Standard deviation of a window without content, such as a plain background, in which blur cannot be measured."""


def center_crop(image: Image.Image, bucket: Size) -> Image.Image:
    """The center crop of an image with the aspect ratio of its bucket, reduced to the bucket's size; never enlarged.

    Args:
        bucket: (height, width) in pixels.
    """
    height, width = covering_size((image.height, image.width), bucket)
    if height < image.height:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    scale = image.height / height
    down, across = round(bucket[0] * scale), round(bucket[1] * scale)
    top, left = (image.height - down) // 2, (image.width - across) // 2
    return image.crop((left, top, left + across, top + down))


def blur(image: Image.Image) -> float:
    """Blur of the sharpest part of an image, from 0 (sharp) to 1: the least `skimage.measure.blur_effect` of nine overlapping
    windows of half the height and width. A blurred background beside a sharp subject has no effect.

    Source: Crete, Dolmiere, Ladret and Nicolas, "The blur effect: perception and estimation with a new no-reference perceptual
    blur metric" (2007).
    """
    gray = _gray(image)
    windows = [window for window in _windows(gray) if window.std() > _FLAT] or [gray]
    return float(min(blur_effect(window, h_size=_KERNEL) for window in windows))


def brightness(image: Image.Image, mask: Image.Image | None = None) -> tuple[float, float]:
    """The 10th and the 90th percentile of the luminance, 0 (black) to 1 (white), within the mask if there is one."""
    values = _gray(image)
    if mask is not None and (inside := _inside(mask.resize(image.size))).any():
        values = values[inside]
    low, high = np.percentile(values, (10, 90))
    return float(low), float(high)


def image_hash(image: Image.Image) -> np.ndarray:
    """A perceptual hash: for each of the `HASH_BITS` lowest frequencies of the 32 x 32 luminance besides the mean, whether its
    coefficient of the discrete cosine transform is above their median; (63,), bool."""
    small = _gray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS))
    low = dctn(small, norm="ortho")[:8, :8].ravel()[1:]
    return np.asarray(low > np.median(low))


def subject_shares(mask: Image.Image, bucket: Size) -> tuple[float, float]:
    """Share of the subject that the center crop keeps, and share of the crop that the subject fills; both 0 to 1.

    Args:
        mask: white on the subject. `bucket`: (height, width) of the crop, pixels.
    """
    height, width = covering_size((mask.height, mask.width), bucket)
    whole = _inside(mask.resize((width, height)))
    top, left = (height - bucket[0]) // 2, (width - bucket[1]) // 2
    crop = whole[top : top + bucket[0], left : left + bucket[1]]
    return (float(crop.sum() / whole.sum()) if whole.any() else 0.0), float(crop.mean())


def _gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=np.float64) / 255


def _inside(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask.convert("L")) > 127


def _windows(gray: np.ndarray) -> Iterator[np.ndarray]:
    """Nine overlapping windows of half the height and width."""
    down, across = (max(1, side // 2) for side in gray.shape)
    for top in (0, (gray.shape[0] - down) // 2, gray.shape[0] - down):
        for left in (0, (gray.shape[1] - across) // 2, gray.shape[1] - across):
            yield gray[top : top + down, left : left + across]
