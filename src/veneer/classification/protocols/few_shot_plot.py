"""Plot of few-shot curves, with a panel for each method.

`python -m veneer.classification.protocols.few_shot_plot FOLDER … --out FILE`

The folders are those of comparisons with several numbers of shots. Their curves are one figure, so that methods of different
models can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.plot_file import panels, write_figure

from ..report.comparison_table import baseline_of
from ..report.plots import BLUE, GREY, ORANGE

FILE = "few_shot.json"
COLUMNS = 5
MARGIN = 3
"""Percentage points of the vertical axis beyond the curves."""


def write_few_shot_plot(tables: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Plots the test accuracy over the shots: a panel for each method, with the other methods of its model in gray.

    Bands are 95 % intervals over seeds. The baseline of a model is dashed. All panels have the same axes.

    Args:
        tables: name of the model to the records of `summarize_few_shot`.
    """
    curves = {model: _curves(records) for model, records in tables.items()}
    shown = [(model, row) for model, of_model in curves.items() for row in of_model if row != baseline_of([*of_model])]
    shown = shown or [(model, row) for model, of_model in curves.items() for row in of_model]
    lines = math.ceil(len(shown) / COLUMNS)
    columns = math.ceil(len(shown) / lines)
    figure, grid = panels(2.15 * columns, 1.75 * lines + 0.5, columns, lines, squeeze=False)
    for axes, (model, row) in zip(grid.flat, shown, strict=False):
        _panel(axes, curves[model], row)
        axes.set_title(f"{row}\n{model}" if len(tables) > 1 else row, fontsize=8)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    _share_axes(grid.flat[: len(shown)], tables)
    figure.supxlabel("training images per class", fontsize=9)
    figure.supylabel("test accuracy, %", fontsize=9)
    write_figure(figure, path)


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Row to its records, by shots."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda each: each["shots"]):
        curves.setdefault(record["row"], []).append(record)
    return {row: curves[row] for row in dict.fromkeys(record["row"] for record in records)}


def _panel(axes: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]], row: str) -> None:
    baseline = baseline_of([*curves])
    for name, records in curves.items():
        shots, accuracy = [each["shots"] for each in records], [100 * each["accuracy"] for each in records]
        if name == row:
            halves = [100 * (each["half"] or 0) for each in records]
            low, high = ([a + side * half for a, half in zip(accuracy, halves, strict=True)] for side in (-1, 1))
            axes.fill_between(shots, low, high, color=BLUE, alpha=0.15, linewidth=0, zorder=2)
            axes.plot(shots, accuracy, color=BLUE, marker=".", zorder=4)
        elif name == baseline:
            axes.plot(shots, accuracy, color=ORANGE, linestyle="--", linewidth=1, zorder=3)
        else:
            axes.plot(shots, accuracy, color=GREY, alpha=0.25, linewidth=0.7, zorder=1)


def _share_axes(grid: Sequence[Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    records = [record for table in tables.values() for record in table]
    shots = sorted({record["shots"] for record in records})
    accuracies = [100 * record["accuracy"] for record in records]
    for axes in grid:
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.set_ylim(min(accuracies) - MARGIN, max(accuracies) + MARGIN)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m veneer.classification.protocols.few_shot_plot", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of veneer compare with several numbers of shots")
    parser.add_argument("--out", type=Path, default=Path("few_shot.png"), help="PNG file (default: few_shot.png)")
    options = parser.parse_args(arguments)
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for folder in options.folders:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        tables.setdefault(record["config"]["model"], []).extend(record["table"])
    write_few_shot_plot(tables, options.out)


if __name__ == "__main__":
    main()
