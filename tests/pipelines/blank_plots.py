"""Plots that are not rendered: rendering takes half the time of a short run of a classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

RENDER = Figure.savefig


@contextlib.contextmanager
def blank_plots() -> Iterator[None]:
    """Writes plots as white images of their size.

    A run of each command renders its plots: `test_transfer`, `test_search` and `test_analyze` here, `test_comparison`,
    `test_few_shot` and `test_multi_label` in `tests/classification`.
    """
    with _saving(_write_blank):
        yield


@contextlib.contextmanager
def rendered_plots() -> Iterator[None]:
    """Renders plots inside `blank_plots`."""
    with _saving(RENDER):
        yield


@contextlib.contextmanager
def _saving(savefig: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


def _write_blank(figure: Figure, file: Any, format: str = "png") -> None:
    width, height = (round(side * figure.dpi) for side in figure.get_size_inches())
    Image.new("L", (width, height), 255).save(file, format=format)
