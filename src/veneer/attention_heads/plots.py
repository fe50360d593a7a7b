"""Plots of a study: importance and pattern by layer and head, mean maps, and where an image reads each word."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from veneer.plot_file import panels, write_figure

from .layers import AttentionLayer
from .patterns import PATTERNS
from .study import HeadReport

COLORS = ("#d9730d", "#1f6feb", "#8250df", "#2da44e", "#d0d7de")
LONGEST = 26


def write_importance(layers: Sequence[AttentionLayer], reports: Sequence[HeadReport], measurement: str, path: Path) -> None:
    """Plots the change of a measurement without each head, and the patterns: one row per layer, one column per head.

    Args:
        measurement: key of the changes, such as `accuracy`.
    """
    ways = list(reports[0].changes)
    figure, (axes,) = panels(2.2 + 3.4 * (len(ways) + 1), 1.6 + 0.34 * len(layers), len(ways) + 1, squeeze=False)
    tables = [_table(layers, [report.changes[way][measurement] for report in reports]) for way in ways]
    most = max((float(np.nanmax(np.abs(table))) for table in tables), default=0.0) or 1.0
    signed = any(float(np.nanmin(table)) < 0 for table in tables)
    for panel, way, table in zip(axes, ways, tables, strict=False):
        heatmap = panel.imshow(table, cmap="RdBu" if signed else "Blues", vmin=-most if signed else 0, vmax=most, aspect="auto")
        panel.set_title(f"{measurement} without the head, {way}", fontsize=9)
        figure.colorbar(heatmap, ax=panel, fraction=0.05, pad=0.03)
    _patterns(axes[-1], layers, reports)
    for panel in axes:
        panel.set_xlabel("head")
        panel.set_xticks(range(max(layer.heads for layer in layers)))
        panel.set_yticks(range(len(layers)), ["" for _ in layers])
    axes[0].set_yticks(range(len(layers)), [_short(layer.path) for layer in layers], fontsize=7)
    write_figure(figure, path)


def _patterns(panel: Any, layers: Sequence[AttentionLayer], reports: Sequence[HeadReport]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    indices = [PATTERNS.index(report.pattern.name) if report.pattern else math.nan for report in reports]
    panel.imshow(_table(layers, indices), cmap=ListedColormap(COLORS), vmin=-0.5, vmax=len(PATTERNS) - 0.5, aspect="auto")
    panel.set_title("pattern", fontsize=9)
    legend = [Patch(color=color, label=name) for name, color in zip(PATTERNS, COLORS, strict=True)]
    panel.legend(handles=legend, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def write_maps(layers: Sequence[AttentionLayer], maps: Mapping[str, Tensor], reports: Sequence[HeadReport], path: Path) -> None:
    """Plots the mean map of each head with its pattern: queries down, keys across, each map up to its own largest value."""
    rows = [layer for layer in layers if layer.name in maps]
    columns = max(layer.heads for layer in rows)
    figure, grid = panels(1.35 * columns + 1.2, 1.5 * len(rows) + 0.4, columns, len(rows), squeeze=False)
    patterns = {(report.layer, report.head): report.pattern for report in reports}
    for line, layer in zip(grid, rows, strict=True):
        for head, cell in enumerate(line):
            cell.set_xticks([])
            cell.set_yticks([])
            if head >= layer.heads:
                cell.axis("off")
                continue
            cell.imshow(maps[layer.name][head].numpy(), cmap="viridis", aspect="auto")
            pattern = patterns[layer.name, head]
            cell.set_title(f"{head} {pattern.name if pattern else ''}", fontsize=6)
        line[0].set_ylabel(_short(layer.path, 16), fontsize=5)
    write_figure(figure, path)


def write_words(
    layers: Sequence[AttentionLayer], maps: Mapping[str, Tensor], words: Sequence[str], image: Any, path: Path
) -> None:
    """Plots where an image reads each word: the mean cross-attention over heads and layers, for each size of the latents.

    Args:
        words: text of each key, in order; keys after them, such as padding, are left out.
        image: the generated image, in the first column.
    """
    sizes: dict[int, list[Tensor]] = {}
    for layer in layers:
        if layer.cross and layer.name in maps and math.isqrt(queries := maps[layer.name].shape[1]) ** 2 == queries:
            sizes.setdefault(math.isqrt(queries), []).append(maps[layer.name].mean(0))
    figure, grid = panels(1.3 * (len(words) + 1), 1.6 * len(sizes), len(words) + 1, len(sizes), squeeze=False)
    for line, (side, parts) in zip(grid, sorted(sizes.items(), reverse=True), strict=True):
        mean = sum(parts[1:], start=parts[0]) / len(parts)
        for cell in line:
            cell.axis("off")
        line[0].imshow(image)
        line[0].set_title(f"{side} × {side}", fontsize=7)
        for index, (word, cell) in enumerate(zip(words, line[1:], strict=True)):
            cell.imshow(mean[:, index].reshape(side, side).numpy(), cmap="viridis")
            cell.set_title(word, fontsize=7)
    write_figure(figure, path)


def _table(layers: Sequence[AttentionLayer], values: Sequence[float]) -> Any:
    """Values of all heads in order as (layers, heads), NaN beyond the heads of a layer."""
    table = np.full((len(layers), max(layer.heads for layer in layers)), np.nan)
    rest = iter(values)
    for row, layer in enumerate(layers):
        table[row, : layer.heads] = [next(rest) for _ in range(layer.heads)]
    return table


def _short(path: str, most: int = LONGEST) -> str:
    """A path without words that every block of a UNet has."""
    for word in ("transformer_blocks.", "attentions.", "_blocks", "_block"):
        path = path.replace(word, "")
    return path if len(path) <= most else f"…{path[1 - most :]}"
