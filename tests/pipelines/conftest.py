"""Photos for the commands that train on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.images import save


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        save(folder / f"{i}.png", 48, 40, seed=i)
    return folder
