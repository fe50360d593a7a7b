"""Foreground against background, by colour: `mask`."""

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from .color_modes import Array, colours, drawn, lab, upright_rgb


def mask(picture: Image.Image, *, rim: float = 0.03, least: float = 12.0, speck: float = 0.004) -> Image.Image:
    """The object white, the background black.

    d(p) = min over the border's colours c of |Lab(p) - c|, of the picture lightly smoothed; white where d is over Otsu's
    threshold and over `least`; holes are filled, specks removed. The border's colours are the means of the larger of six groups.

    It can tell an object from a background of few colours: an icon, a product on a table, a figure against a wall or the sky. It
    knows nothing of things: an object of a colour that the border has too is cut into, a background of many colours (a wood, a
    street, a kitchen) or a shadow is partly taken for the object, and an object that fills the border is lost. Where masks matter
    in such photos, draw them or take them from a segmentation model, and give them as pairs.

    Args:
        rim: width of the border that counts as background, as a part of the short side, at least 1 pixel.
        least: the smallest distance in Lab that can be an object; 2 is barely seen, 100 is black to white.
        speck: parts of less than this share of the picture are removed.
    """
    values = colours(picture)
    side = min(picture.size)
    smooth = ndimage.gaussian_filter(values, (max(0.5, 0.005 * side),) * 2 + (0,), mode="nearest")
    distance = _distance(lab(smooth), _border_colours(upright_rgb(picture), max(1, round(rim * side))))
    if distance.max() <= least:
        return drawn(np.zeros_like(distance))
    region = distance > max(threshold_otsu(distance), least)
    parts, _ = ndimage.label(ndimage.binary_fill_holes(region))
    large = np.bincount(parts.ravel()) >= speck * region.size
    return drawn(large[parts] & (parts > 0))


def threshold_otsu(values: Array, bins: int = 256) -> float:
    """The value that splits values in two classes with the largest variance between them, to a bin of their histogram.

    Source: Otsu, A threshold selection method from gray-level histograms, IEEE SMC 9, 1979.
    """
    counts, edges = np.histogram(values, bins)
    centers = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts)[:-1], np.cumsum(counts[::-1])[::-1][1:]
    sums = np.cumsum(counts * centers)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(centers[between.argmax()])


def _border_colours(picture: Image.Image, rim: int, most: int = 6, share: float = 0.08) -> Array:
    """Lab colours (n, 3) of the border: those of at most `most` groups that hold at least `share` of it."""
    values = np.asarray(picture)
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
    return np.min([np.sqrt(((pixels - colour) ** 2).sum(-1)) for colour in known], axis=0)
