"""The order of tests in several processes."""

from __future__ import annotations

import pytest

from tests.conftest import in_parts


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_each_part_begins_with_its_groups(parts: int) -> None:
    groups, others = [["a", "b"], ["c"], ["d", "e", "f"]], [str(number) for number in range(25)]
    ordered = in_parts(groups, others, parts)
    assert sorted(ordered) == sorted([*"abcdef", *others])
    assert [each for each in ordered if each.isdigit()] == others
    starts = [0]
    for part in range(parts):
        starts.append(starts[-1] + (len(ordered) - starts[-1]) // (parts - part))
    fronts = ["".join(letter for group in groups[part::parts] for letter in group) for part in range(parts)]
    for front, start, end in zip(fronts, starts, starts[1:], strict=False):
        assert "".join(ordered[start:end])[: len(front)] == front


def test_a_group_that_is_longer_than_a_part_goes_on_in_the_next() -> None:
    assert in_parts([list("abcdef"), ["g"]], ["1", "2"], 2) == [*"abcdef", "g", "1", "2"]
