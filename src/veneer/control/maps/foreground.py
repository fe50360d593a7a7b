"""Foreground mask by color: `mask`."""

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from .color_modes import Array, lab, rgb_values, to_image, to_rgb


def mask(image: Image.Image, *, rim: float = 0.03, least: float = 12.0, speck: float = 0.004) -> Image.Image:
    """Mask of the foreground: white object, black background.

    d(p) = min over the border's colors c of |Lab(p) - c|, on the slightly smoothed image; white where d is over Otsu's
    threshold and over `least`; holes are filled, specks removed. The border's colors are the means of the larger of six groups.

    It separates an object from a background of few colors: an icon, a product on a table, a figure against a wall or the sky. It
    does not segment by content: parts of the object with a color of the border are missing, parts of a background of many colors
    (a forest, a street, a kitchen) and shadows are included, and an object that covers the border is not found. For such photos
    use masks from a segmentation model or an image editor, with condition `pairs`.

    Args:
        rim: width of the border used as background, as a fraction of the shorter side, at least 1 pixel.
        least: minimum Lab distance of an object; 2 is barely visible, 100 is black to white.
        speck: regions below this fraction of the image are removed.
    """
    values = rgb_values(image)
    side = min(image.size)
    smooth = ndimage.gaussian_filter(values, (max(0.5, 0.005 * side),) * 2 + (0,), mode="nearest")
    distance = _distance(lab(smooth), _border_colors(to_rgb(image), max(1, round(rim * side))))
    if distance.max() <= least:
        return to_image(np.zeros_like(distance))
    region = distance > max(threshold_otsu(distance), least)
    parts, _ = ndimage.label(ndimage.binary_fill_holes(region))
    large = np.bincount(parts.ravel()) >= speck * region.size
    return to_image(large[parts] & (parts > 0))


def threshold_otsu(values: Array, bins: int = 256) -> float:
    """The threshold with the largest between-class variance, up to a histogram bin.

    Source: Otsu, A threshold selection method from gray-level histograms, IEEE SMC 9, 1979.
    """
    counts, edges = np.histogram(values, bins)
    centers = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts)[:-1], np.cumsum(counts[::-1])[::-1][1:]
    sums = np.cumsum(counts * centers)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(centers[between.argmax()])


def _border_colors(image: Image.Image, rim: int, most: int = 6, share: float = 0.08) -> Array:
    """Lab colors (n, 3) of the border: means of up to `most` clusters with at least `share` of its pixels."""
    values = np.asarray(image)
    inner = np.zeros(values.shape[:2], bool)
    inner[rim:-rim, rim:-rim] = True
    strip = Image.fromarray(values[~inner][None])
    grouped = strip.quantize(most, Image.Quantize.MEDIANCUT, kmeans=1)
    held = np.asarray(grouped).ravel()
    counts = np.bincount(held, minlength=most)
    strong = np.flatnonzero(counts >= share * counts.sum())
    flat = values[~inner].astype(np.float32) / 255
    return lab(np.stack([flat[held == group].mean(0) for group in strong])[None])[0]


def _distance(pixels: npt.NDArray, known: Array) -> Array:
    return np.min([np.sqrt(((pixels - color) ** 2).sum(-1)) for color in known], axis=0)
