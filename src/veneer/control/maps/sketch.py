"""Maps of what somebody draws by hand, in the look of the maps that were learnt from."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.morphology import skeletonize

from veneer.injection.errors import VeneerError

from . import maps
from .color_modes import colours, drawn, luminance
from .edges import Mask

DARK = 0.75
"""Brightness below which a line is drawn."""


def sketch_map(drawing: Image.Image, condition: str, size: tuple[int, int]) -> Image.Image:
    """The map that a drawing on white means, for a condition.

    Edges: the middle of each line, as thick as the condition's own maps have it, whatever pen drew it. A mask: what is drawn, and
    what a closed line holds. Tones and colours: the drawing is taken as a picture.

    Args:
        drawing: dark or coloured on white. `condition`: of `veneer.control.maps.maps`. `size`: (width, height) of the map.
    Raises:
        VeneerError: nothing is drawn, or a condition that cannot be drawn.
    """
    kind = maps.get(condition)
    ink = _ink(drawing)
    if not ink.any():
        raise VeneerError("the sketch is empty. Draw some lines first.", where="sketch", given="empty")
    if kind.measures == "edges":
        return _lines(condition, _moved(skeletonize(ink), size))
    if kind.measures == "region":
        filled = ndimage.binary_fill_holes(ink).astype(np.float32)
        return drawn(np.asarray(Image.fromarray(filled).resize(size, Image.Resampling.BOX)) >= 0.5)
    return kind(drawing.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _ink(drawing: Image.Image) -> Mask:
    """Where something is drawn: darker than paper, or coloured."""
    found: Mask = (luminance(drawing) < DARK) | (np.ptp(colours(drawing), axis=-1) > 1 - DARK)
    return found


def _moved(lines: Mask, size: tuple[int, int]) -> Mask:
    """Thin lines on another grid: a pixel is of the lines if one of theirs falls into it."""
    rows, columns = np.nonzero(lines)
    found = np.zeros(size[::-1], bool)
    found[rows * size[1] // lines.shape[0], columns * size[0] // lines.shape[1]] = True
    thin: Mask = skeletonize(found)
    return thin


def _lines(condition: str, lines: Mask) -> Image.Image:
    """Lines one pixel wide, in the look of a condition."""
    if condition == "scribble":
        return drawn(ndimage.distance_transform_edt(~lines) <= max(1.0, 0.012 * min(lines.shape) / 2))
    if condition == "soft_edge":
        soft = ndimage.gaussian_filter(lines.astype(np.float32), max(0.8, 0.005 * min(lines.shape)))
        return drawn(soft / soft.max())
    return drawn(lines)
