"""Edges of color: thin (`canny`), soft (`soft_edge`) and thick (`scribble`).

All use the same gradient: each channel of Lab / 100 is smoothed by a Gaussian of σ, and the channel with the largest derivative
is used, which also finds edges between colors of equal brightness. The result is the contrast, √(2π) σ |∇(G_σ * c)|, which equals
h on a straight step of height h for every σ; black to white is 1, and 0.02 is barely visible. Thresholds are contrasts, and
lengths are fractions of the shorter side, so that an image and its reduction have the same lines.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from .color_modes import Array, lab, rgb_values, to_image

Mask = npt.NDArray[np.bool_]


class Gradient(NamedTuple):
    """Contrast (height, width) and the unit direction in which the color changes there."""

    contrast: Array
    down: Array
    right: Array


def gradient(image: Image.Image, sigma: float) -> Gradient:
    """The gradient of Lab's strongest channel; `sigma` in pixels. See the module."""
    values = lab(rgb_values(image)) / np.float32(100)
    steps = np.stack(
        [ndimage.gaussian_filter(values, (sigma, sigma, 0), order, mode="nearest") for order in ((1, 0, 0), (0, 1, 0))]
    )
    length = np.hypot(*steps)
    strongest = length.argmax(-1)[..., None]
    along = np.take_along_axis(length, strongest, -1)[..., 0]
    down, right = (np.take_along_axis(step, strongest, -1)[..., 0] / np.maximum(along, 1e-12) for step in steps)
    return Gradient(along * np.float32(math.sqrt(2 * math.pi) * sigma), down, right)


def canny(image: Image.Image, *, sigma: float = 0.004, low: float = 0.12, high: float = 0.22, least: float = 0.06) -> Image.Image:
    """Lines one pixel wide, white on black, where the color changes most.

    Args:
        sigma: smoothing, as a fraction of the shorter side, at least 0.7 pixels.
        low, high: hysteresis thresholds of the contrast; a line exceeds `high` somewhere and `low` everywhere.
        least: minimum length of a line, as a fraction of the shorter side.

    Source: Canny, PAMI 1986. Deviation: the strongest Lab channel instead of brightness; short lines are removed.
    """
    return to_image(_lines(image, max(0.7, sigma * min(image.size)), low, high, least))


def _lines(image: Image.Image, sigma: float, low: float, high: float, least: float) -> Mask:
    found = gradient(image, sigma)
    ridge = np.where(_ridge(found), found.contrast, 0)
    parts, count = ndimage.label(ridge > low, np.ones((3, 3)))  # 8-connectivity
    kept = np.bincount(parts[ridge > high], minlength=count + 1) > 0
    kept &= np.bincount(parts.ravel(), minlength=count + 1) >= least * min(image.size)
    lines: Mask = kept[parts] & (parts > 0)
    return lines


def _ridge(found: Gradient) -> Mask:
    """Non-maximum suppression: contrast at least that of the next pixel and above that of the previous; ties keep one."""
    place = np.indices(found.contrast.shape, np.float32)
    step = np.stack([found.down, found.right])
    ahead, back = (ndimage.map_coordinates(found.contrast, place + way * step, order=1, mode="nearest") for way in (1, -1))
    return (found.contrast >= ahead) & (found.contrast > back)


def soft_edge(image: Image.Image, *, fine: float = 0.005, coarse: float = 0.015, white: float = 0.5) -> Image.Image:
    """Brightness by contrast, in [0, 1]: √(fine * coarse) of the contrasts at two σ. Outlines are sharp and bright; textures such
    as fur and grass, which vanish at the coarse σ, are faint. No neural network is used.

    Args:
        fine, coarse: smoothing, as fractions of the shorter side, at least 0.8 and 1.6 pixels.
        white: value that maps to white.
    """
    side = min(image.size)
    both = gradient(image, max(0.8, fine * side)).contrast * gradient(image, max(1.6, coarse * side)).contrast
    return to_image(np.sqrt(both) / np.float32(white))


def scribble(
    image: Image.Image, *, sigma: float = 0.01, low: float = 0.16, high: float = 0.28, least: float = 0.15, pen: float = 0.012
) -> Image.Image:
    """Thick lines, white on black, of the strong and long edges only.

    Args:
        sigma: smoothing, as a fraction of the shorter side, at least 1.2 pixels.
        low, high, least: as in `canny`.
        pen: line width, as a fraction of the shorter side, at least 3 pixels.
    """
    side = min(image.size)
    lines = _lines(image, max(1.2, sigma * side), low, high, least)
    return to_image(ndimage.distance_transform_edt(~lines) <= max(1.0, pen * side / 2)) if lines.any() else to_image(lines)
