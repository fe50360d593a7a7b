"""Plots of matplotlib as PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .atomic_files import write_atomically


def panels(width: float, height: float, columns: int = 1, rows: int = 1, *, squeeze: bool = True) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes: (rows, columns), without dimensions of 1 if `squeeze`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=squeeze)


def blank(width: float, height: float) -> tuple[Any, Any]:
    """A figure of a size in inches, and one axes over all of it, in inches from the top left corner, without ticks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return figure, axes


def write_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())
