"""Resizing of control maps, without new colors in maps of few colors."""

import numpy as np
from PIL import Image
from scipy import ndimage

_FEW = 32
_Sampling = Image.Resampling


def resize_map(given: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes a map to `size` (width, height) pixels.

    Maps of at most 32 colors are resized with nearest neighbor, which adds no colors. When a two-color map of thin lines is
    reduced, which would lose lines, a pixel is set if the lines cover at least half of what a one-pixel line across it would.
    Maps of more colors are resized bicubically.

    Args:
        given: an RGB map.
    """
    if given.size == tuple(size):
        return given
    held = given.getcolors(_FEW)
    if held is None:
        return given.resize(size, _Sampling.BICUBIC)
    scale = max(old / new for old, new in zip(given.size, size, strict=True))
    if len(held) == 2 and scale > 1:
        (_, lines), (_, ground) = sorted(held, key=lambda each: each[0])
        covered = (np.asarray(given) == lines).all(-1)
        if _is_thin(covered, scale):
            share = Image.fromarray(covered.astype(np.float32)).resize(size, _Sampling.BOX)
            kept = np.asarray(share)[..., None] >= 0.5 / scale
            return Image.fromarray(np.where(kept, np.array(lines, np.uint8), np.array(ground, np.uint8)))
    return given.resize(size, _Sampling.NEAREST)


def _is_thin(covered: np.ndarray, scale: float) -> bool:
    """Whether less than half of a region is farther than one new pixel from its boundary."""
    return bool((ndimage.distance_transform_edt(covered)[covered] > scale).mean() < 0.5)
