"""Maps at another size, without new colours where they have few."""

import numpy as np
from PIL import Image
from scipy import ndimage

_FEW = 32
_Sampling = Image.Resampling


def resized(given: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A map at `size` (width, height) pixels.

    Maps of at most 32 colours keep them: the nearest pixel is taken. But a drawing in thin lines, of two colours and reduced,
    would lose lines that way: there, a pixel is of the lines if they cover half of what one thin line across it would. Maps of
    more colours are resized bicubically.

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
    """Whether less than half of a region is further than a new pixel from its rim."""
    return bool((ndimage.distance_transform_edt(covered)[covered] > scale).mean() < 0.5)
