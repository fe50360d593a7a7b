"""Patch grids of token sequences."""

from __future__ import annotations

import math


def grid_of(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a grid with that many tokens: the model's own, or one of the same aspect ratio.

    Args:
        tokens: patches of one image, at least 1, without class and register tokens.
        grid: (height, width) of the patches at the model's image size.
    Raises:
        ValueError: no grid of that aspect ratio has this number of patches.

    >>> grid_of(196, (14, 14)), grid_of(72, (3, 6)), grid_of(8, (3, 6))
    ((14, 14), (6, 12), (2, 4))
    """
    height, width = grid
    if tokens == height * width:
        return height, width
    common = math.gcd(height, width)
    height, width = height // common, width // common
    times = math.isqrt(tokens // (height * width))
    if times < 1 or height * width * times * times != tokens:
        raise ValueError(
            f"{tokens} patches form no grid: expected {grid[0]} × {grid[1]} = {grid[0] * grid[1]}, or another grid of aspect "
            f"ratio {height}:{width}. Use images of that aspect ratio, and do not insert or drop tokens."
        )
    return height * times, width * times
