"""The support matrix in the README is what needs and offers give."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.testing.matrix import between_markers, support_matrix

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_has_the_current_matrix() -> None:
    assert between_markers(README.read_text("utf-8")) == support_matrix(), (
        "write what `python -m veneer.testing.matrix` prints between the markers"
    )


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="matrix"):
        between_markers("# veneer")
