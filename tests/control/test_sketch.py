"""Sketches become maps like computed ones, whatever the line width."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.raising import raises
from veneer.control.maps.maps import get
from veneer.control.maps.sketch import sketch_map
from veneer.injection.errors import OptionError, VeneerError

SIZE = (64, 64)


def ring(pen: int, color: str = "black", side: int = 512) -> Image.Image:
    """A circle with a radius of a quarter of the side."""
    page = Image.new("RGB", (side, side), "white")
    radius = side // 4 + pen // 2
    ImageDraw.Draw(page).ellipse([side // 2 - radius] * 2 + [side // 2 + radius] * 2, outline=color, width=pen)
    return page


def white(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) > 127


def radii(image: Image.Image) -> np.ndarray:
    """Distances of white pixels from the middle."""
    rows, columns = np.nonzero(white(image))
    return np.hypot(rows - 31.5, columns - 31.5)


@pytest.mark.parametrize("pen", [3, 12, 40])
@pytest.mark.parametrize("color", ["black", "yellow"])
def test_lines_are_as_thick_as_in_computed_maps(pen: int, color: str) -> None:
    disc = ring(256, side=512)  # its edge is at half of the side: a circle of the same kind of line
    for name in ("canny", "scribble"):
        found = sketch_map(ring(pen, color), name, SIZE)
        assert found.size == SIZE
        assert found.mode == "RGB"
        assert set(np.unique(np.asarray(found))) == {0, 255}
        around = radii(found)
        assert np.abs(around - 16).max() < 3
        learned = get(name)(disc.resize(SIZE, Image.Resampling.LANCZOS))
        assert around.size / (2 * np.pi * 16) == pytest.approx(
            white(learned).sum() / (2 * np.pi * radii(learned).mean()), rel=0.35
        )


def test_a_closed_line_is_a_region() -> None:
    found = sketch_map(ring(6), "mask", SIZE)
    inside = np.hypot(*np.indices((64, 64)) - 31.5)
    assert white(found)[inside < 15].all()
    assert not white(found)[inside > 18].any()


def test_soft_lines_are_bright_in_the_middle() -> None:
    found = np.asarray(sketch_map(ring(6), "soft_edge", SIZE).convert("L"))
    assert found.max() == 255
    assert len(np.unique(found)) > 10


def test_colors_are_an_image() -> None:
    page = Image.new("RGB", (128, 128), "red")
    assert np.asarray(sketch_map(page, "palette", SIZE)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64 * 64


def test_an_empty_sketch_and_unsupported_conditions_are_errors() -> None:
    with raises(VeneerError, where="sketch", given="empty"):
        sketch_map(Image.new("RGB", (512, 512), "white"), "canny", SIZE)
    with raises(OptionError, option="condition", given="image"):
        sketch_map(ring(6), "image", SIZE)
