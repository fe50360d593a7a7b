"""Edges of colour: thin (`canny`), soft (`soft_edge`) and thick (`scribble`).

All begin with the same gradient: each channel of Lab / 100 is smoothed by a Gaussian of σ, and of the three derivatives the
longest is taken, so an edge between two colours of one brightness is an edge. It is given as contrast, √(2π) σ |∇(G_σ * c)|,
which is h on a straight step of height h, whatever σ is; black to white is 1, 0.02 is barely seen. Thresholds are contrasts, and
lengths are parts of the short side, so a picture and its reduction give the same lines.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from .color_modes import Array, colours, drawn, lab

Mask = npt.NDArray[np.bool_]


class Gradient(NamedTuple):
    """Contrast (height, width) and the unit direction in which the colour changes there."""

    contrast: Array
    down: Array
    right: Array


def gradient(picture: Image.Image, sigma: float) -> Gradient:
    """The gradient of Lab's strongest channel; `sigma` in pixels. See the module."""
    values = lab(colours(picture)) / np.float32(100)
    steps = np.stack(
        [ndimage.gaussian_filter(values, (sigma, sigma, 0), order, mode="nearest") for order in ((1, 0, 0), (0, 1, 0))]
    )
    length = np.hypot(*steps)
    strongest = length.argmax(-1)[..., None]
    along = np.take_along_axis(length, strongest, -1)[..., 0]
    down, right = (np.take_along_axis(step, strongest, -1)[..., 0] / np.maximum(along, 1e-12) for step in steps)
    return Gradient(along * np.float32(math.sqrt(2 * math.pi) * sigma), down, right)


def canny(
    picture: Image.Image, *, sigma: float = 0.004, low: float = 0.12, high: float = 0.22, least: float = 0.06
) -> Image.Image:
    """Lines one pixel wide, white on black, where the colour changes most.

    Args:
        sigma: smoothing, as a part of the short side, but at least 0.7 pixels.
        low, high: contrasts; a line has `high` somewhere and `low` everywhere.
        least: length of the shortest line that is drawn, as a part of the short side.

    Source: Canny, PAMI 1986. Deviation: the strongest channel of Lab in place of the brightness; short lines are left out.
    """
    return drawn(_lines(picture, max(0.7, sigma * min(picture.size)), low, high, least))


def _lines(picture: Image.Image, sigma: float, low: float, high: float, least: float) -> Mask:
    found = gradient(picture, sigma)
    ridge = np.where(_ridge(found), found.contrast, 0)
    parts, count = ndimage.label(ridge > low, np.ones((3, 3)))  # pixels that touch by a corner are of one line
    kept = np.bincount(parts[ridge > high], minlength=count + 1) > 0
    kept &= np.bincount(parts.ravel(), minlength=count + 1) >= least * min(picture.size)
    lines: Mask = kept[parts] & (parts > 0)
    return lines


def _ridge(found: Gradient) -> Mask:
    """Where the contrast is no less than a pixel further and greater than a pixel back, so that of two equal pixels one stays."""
    place = np.indices(found.contrast.shape, np.float32)
    step = np.stack([found.down, found.right])
    ahead, back = (ndimage.map_coordinates(found.contrast, place + way * step, order=1, mode="nearest") for way in (1, -1))
    return (found.contrast >= ahead) & (found.contrast > back)


def soft_edge(picture: Image.Image, *, fine: float = 0.005, coarse: float = 0.015, white: float = 0.5) -> Image.Image:
    """Brightness by contrast, in [0, 1]: √(fine * coarse) of the contrasts at two σ, so that outlines are sharp and bright, and
    fur and grass, which are gone at the coarse σ, are faint. No network is asked.

    Args:
        fine, coarse: smoothing, as parts of the short side, but at least 0.8 and 1.6 pixels.
        white: what is drawn white.
    """
    side = min(picture.size)
    both = gradient(picture, max(0.8, fine * side)).contrast * gradient(picture, max(1.6, coarse * side)).contrast
    return drawn(np.sqrt(both) / np.float32(white))


def scribble(
    picture: Image.Image, *, sigma: float = 0.01, low: float = 0.16, high: float = 0.28, least: float = 0.15, pen: float = 0.012
) -> Image.Image:
    """Thick lines, white on black, of the strong and long edges only, as by a broad pen.

    Args:
        sigma: smoothing, as a part of the short side, but at least 1.2 pixels.
        low, high, least: as in `canny`.
        pen: its width, as a part of the short side; lines are at least 3 pixels wide.
    """
    side = min(picture.size)
    lines = _lines(picture, max(1.2, sigma * side), low, high, least)
    return drawn(ndimage.distance_transform_edt(~lines) <= max(1.0, pen * side / 2)) if lines.any() else drawn(lines)
