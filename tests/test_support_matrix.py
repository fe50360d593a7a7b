"""The support matrix that the package carries, and the documentation shows, is what needs and offers give."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import listing
from veneer.testing.matrix import support_matrix


def test_the_package_has_the_current_matrix() -> None:
    assert listing.MATRIX.read_text("utf-8").strip() == support_matrix(), (
        "write what `python -m veneer.testing.matrix` prints to src/veneer/support_matrix.md"
    )


def test_a_matrix_without_a_method_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`veneer methods` is right before the file is written again."""
    monkeypatch.setattr("veneer.testing.matrix.support_matrix", lambda: "computed")
    assert listing.support_matrix() == listing.MATRIX.read_text("utf-8").strip()
    lines = listing.MATRIX.read_text("utf-8").splitlines()
    for missing in (lines[:-1], [line.replace(" `timm_vit` |", "") for line in lines]):
        monkeypatch.setattr(listing, "MATRIX", tmp_path / "matrix.md")
        (tmp_path / "matrix.md").write_text("\n".join(missing), "utf-8")
        assert listing.support_matrix() == "computed"
