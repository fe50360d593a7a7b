"""Shapes rendered as filled icons or as outlines, at all sizes and places of the project's scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from veneer.base_models.pretraining.data.icon_sets import Pixels
from veneer.base_models.pretraining.data.scenes import COLORS, PLACES, SIZES, Compositor, Scene

STYLES = ("filled", "outlines")
STAR = ((50, 4), (61, 38), (97, 38), (68, 59), (79, 94), (50, 73), (21, 94), (32, 59), (3, 38), (39, 38))
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "triangle": ((50, 6), (94, 90), (6, 90)),
    "square": ((12, 12), (88, 12), (88, 88), (12, 88)),
    "diamond": ((50, 4), (88, 50), (50, 96), (12, 50)),
    "cross": ((36, 6), (64, 6), (64, 36), (94, 36), (94, 64), (64, 64), (64, 94), (36, 94), (36, 64), (6, 64), (6, 36), (36, 36)),
    "star": STAR,
    "arrow": ((6, 36), (54, 36), (54, 10), (94, 50), (54, 90), (54, 64), (6, 64)),
    "hexagon": ((27, 8), (73, 8), (96, 50), (73, 92), (27, 92), (4, 50)),
}
"""Class to the corners of its polygon, in percent of the side."""
WIDTH = 5
"""Width of outlines, of a side of 128 pixels."""
ROTATION = 20.0
"""Largest rotation in degrees, to both sides."""


def render_icons(folder: Path, style: str, count: int, label: Literal["shape", "place"] = "shape", seed: int = 0) -> Path:
    """Writes `count` images `CLASS/NUMBER.png` of each class, of random shape, size, place, rotation and colors otherwise.

    Args:
        style: `filled` or `outlines`.
        label: what the classes are: the seven shapes, or the nine places, which need no name of the shape.
    """
    rng, shapes = np.random.default_rng(seed), list(SHAPES)
    for name in shapes if label == "shape" else PLACES:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape, size, place = (str(rng.choice(list(each))) for each in (shapes, SIZES, PLACES))
            shape, place = (name, place) if label == "shape" else (shape, name)
            color, background = (str(each) for each in rng.choice(list(COLORS), 2, replace=False))
            icon = _icon(SHAPES[shape], COLORS[color], style == "outlines", rng.uniform(-ROTATION, ROTATION))
            pixels = Compositor(icon[None])([Scene(0, size, place, background)])[0]
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def _icon(corners: Sequence[tuple[int, int]], color: tuple[int, int, int], outline: bool, angle: float) -> Pixels:
    """RGBA pixels of a rotated polygon on a transparent background."""
    image = Image.new("RGBA", (128, 128))
    points = [(x * 1.28, y * 1.28) for x, y in corners]
    ImageDraw.Draw(image).polygon(points, None if outline else (*color, 255), (*color, 255), WIDTH)
    return np.asarray(image.rotate(angle, Image.Resampling.BICUBIC))
