"""Where the tokens of a sequence stand in the picture."""

from __future__ import annotations

import math


def grid_of(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a grid with that many tokens: a model's own, or one of the same aspect.

    Args:
        tokens: patches of one picture, at least 1, without class and register tokens.
        grid: (height, width) of the patches at the model's own picture size.
    Raises:
        ValueError: no grid of that aspect has so many patches.

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
            f"{tokens} patches stand in no grid: expected {grid[0]} × {grid[1]} = {grid[0] * grid[1]}, or another of the aspect "
            f"{height}:{width}. Give pictures of that aspect, and insert or drop no tokens."
        )
    return height * times, width * times
