"""The grid of a number of patches."""

import math

import pytest

from veneer.functional.grids import grid_of


@pytest.mark.parametrize("grid", [(14, 14), (3, 6), (6, 4), (1, 5), (7, 5)])
def test_every_grid_of_the_aspect_and_no_other(grid: tuple[int, int]) -> None:
    """Against a search through all grids."""
    for tokens in range(1, 300):
        fitting = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0 and h * grid[1] == tokens // h * grid[0]]
        if fitting:
            assert [grid_of(tokens, grid)] == fitting
        else:
            with pytest.raises(ValueError, match=f"^{tokens} "):
                grid_of(tokens, grid)


def test_a_square_number_of_patches_is_no_square_where_the_model_has_none() -> None:
    with pytest.raises(ValueError, match=r"^16 .*18"):
        grid_of(16, (3, 6))
    assert math.prod(grid_of(18, (3, 6))) == 18
