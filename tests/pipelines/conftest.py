"""Photos and base models for the commands that train on them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.blank_plots import blank_plots
from tests.training.images import save
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture(scope="package", autouse=True)
def _blank_plots() -> Iterator[None]:
    with blank_plots():
        yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        save(folder / f"{i}.png", 48, 40, seed=i)
    return folder


@pytest.fixture
def small_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX pipelines with images of 64 × 64 by default, 64 tokens. Their constructor sets 512 × 512, 4,096 tokens."""
    from diffusers import FluxPipeline

    construct = FluxPipeline.__init__

    @functools.wraps(construct)
    def smaller(self: Any, *parts: Any, **named: Any) -> None:
        construct(self, *parts, **named)
        self.default_sample_size = 16

    monkeypatch.setattr(FluxPipeline, "__init__", smaller)


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
