"""Control maps from hand-drawn sketches, similar to the maps of training."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.morphology import skeletonize

from veneer.injection.errors import VeneerError

from . import maps
from .color_modes import luminance, rgb_values, to_image
from .edges import Mask

DARK = 0.75
"""Luminance below which a pixel belongs to a line."""


def sketch_map(sketch: Image.Image, condition: str, size: tuple[int, int]) -> Image.Image:
    """Control map of a sketch on white.

    Edges: the skeleton of the lines with the line width of the condition's maps. Mask: the lines and the regions that they
    enclose. Tones and colors: the map of the sketch as an image.

    Args:
        sketch: dark or colored on white. `condition`: name in `veneer.control.maps.maps`. `size`: (width, height) of the map.
    Raises:
        VeneerError: an empty sketch, or a condition without computed maps.
    """
    kind = maps.get(condition)
    ink = _ink(sketch)
    if not ink.any():
        raise VeneerError("the sketch is empty. Draw some lines first.", where="sketch", given="empty")
    if kind.measures == "edges":
        return _lines(condition, _resize_lines(skeletonize(ink), size))
    if kind.measures == "region":
        filled = ndimage.binary_fill_holes(ink).astype(np.float32)
        return to_image(np.asarray(Image.fromarray(filled).resize(size, Image.Resampling.BOX)) >= 0.5)
    return kind(sketch.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _ink(sketch: Image.Image) -> Mask:
    """Pixels that are dark or colored."""
    found: Mask = (luminance(sketch) < DARK) | (np.ptp(rgb_values(sketch), axis=-1) > 1 - DARK)
    return found


def _resize_lines(lines: Mask, size: tuple[int, int]) -> Mask:
    """Thin lines at another size: a pixel is set if a line pixel maps to it."""
    rows, columns = np.nonzero(lines)
    found = np.zeros(size[::-1], bool)
    found[rows * size[1] // lines.shape[0], columns * size[0] // lines.shape[1]] = True
    thin: Mask = skeletonize(found)
    return thin


def _lines(condition: str, lines: Mask) -> Image.Image:
    """Renders one-pixel lines as maps of a condition."""
    if condition == "scribble":
        return to_image(ndimage.distance_transform_edt(~lines) <= max(1.0, 0.012 * min(lines.shape) / 2))
    if condition == "soft_edge":
        soft = ndimage.gaussian_filter(lines.astype(np.float32), max(0.8, 0.005 * min(lines.shape)))
        return to_image(soft / soft.max())
    return to_image(lines)
