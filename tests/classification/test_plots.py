"""Image grids: every image in its cell, with its aspect ratio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from veneer.classification.report.plots import CELL, SIDE, TITLE, write_image_grid

DPI = 110


@pytest.mark.parametrize(("count", "columns"), [(1, 3), (5, 4), (11, 6)])
def test_every_image_is_in_its_cell(count: int, columns: int, tmp_path: Path) -> None:
    """Read back at the pixels where an image of 2:1 begins and ends."""
    colors = [(20 * i, 255 - 20 * i, 10) for i in range(count)]
    write_image_grid([(Image.new("RGB", (64, 32), color), "title") for color in colors], "images", tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    rows = -(-count // columns)
    assert pixels.shape[:2] == pytest.approx((DPI * (TITLE + CELL[1] * rows), DPI * CELL[0] * columns), abs=1)
    for index, color in enumerate(colors):
        row, column = divmod(index, columns)
        x, y = CELL[0] * (column + 0.5), TITLE + CELL[1] * (row + 1) - SIDE / 2
        inside = [(x, y), (x - 0.48 * SIDE, y), (x + 0.48 * SIDE, y), (x, y - 0.23 * SIDE), (x, y + 0.23 * SIDE)]
        assert {tuple(pixels[round(DPI * v), round(DPI * u)]) for u, v in inside} == {color}
        outside = [(x - 0.52 * SIDE, y), (x + 0.52 * SIDE, y), (x, y + 0.27 * SIDE)]
        assert {tuple(pixels[min(round(DPI * v), len(pixels) - 1), round(DPI * u)]) for u, v in outside} == {(255, 255, 255)}


def test_a_grid_without_images_has_its_title(tmp_path: Path) -> None:
    write_image_grid([], "0 of 10 test images misclassified", tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels[: round(DPI * TITLE)].min() < 100
    assert pixels[round(DPI * TITLE) :].min() == 255
