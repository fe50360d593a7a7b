"""Photos and base models for the commands that train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.images import save
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        save(folder / f"{i}.png", 48, 40, seed=i)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a saved tiny pipeline, by family, that samples in a few steps."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("bases") / kind
            tiny_pipeline(kind).save_pretrained(made[kind])
            (made[kind] / "veneer.json").write_text('{"steps": 4}')
        return str(made[kind])

    return folder
