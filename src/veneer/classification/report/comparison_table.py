"""The table and the picture of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..train.comparison import Measured, by_row
from .metrics import mean_interval
from .plots import BLUE, GREY, ORANGE, panels, write_figure

BASELINES = {"linear_probe": "the linear probe", "zero_shot": "zero-shot"}
"""Rows that the others are compared with, the first of them that is there, and how they are called."""


@dataclass(frozen=True)
class Line:
    """A row over its seeds.

    Args:
        row: its label. `seeds`: how many. `accuracy`, `half`: mean test accuracy and half its 95 % interval over seeds.
        over, over_half: mean of the differences to the baseline, seed by seed, and half its interval; None for the baseline.
        validation: mean accuracy that chose the epoch.
    """

    row: str
    seeds: int
    accuracy: float
    half: float
    over: float | None
    over_half: float | None
    validation: float
    runs: tuple[Measured, ...]


def lines_of(runs: Sequence[Measured], rows: Sequence[str]) -> list[Line]:
    """A line for each row, in order."""
    baseline = baseline_of(rows)
    below = {m.seed: m.test_accuracy for m in by_row(runs, baseline)}
    found = []
    for row in rows:
        mine = by_row(runs, row)
        accuracy, half = mean_interval([m.test_accuracy for m in mine])
        paired = [m.test_accuracy - below[m.seed] for m in mine if m.seed in below]
        over, over_half = mean_interval(paired) if paired and row != baseline else (None, None)
        validation = sum(m.val_accuracy for m in mine) / len(mine)
        found.append(Line(row, len(mine), accuracy, half, over, over_half, validation, tuple(mine)))
    return found


def baseline_of(rows: Sequence[str]) -> str:
    """The row that the others are compared with; "" if there is none."""
    return next((row for row in BASELINES if row in rows), "")


def called(lines: Sequence[Line]) -> str:
    """How the baseline is called."""
    return BASELINES.get(baseline_of([line.row for line in lines]), "a baseline")


def table(lines: Sequence[Line]) -> str:
    """Markdown, the best validation accuracy first."""
    head = (
        f"| method | test accuracy | over {called(lines)} | validation | trained | stored | step / frozen pass | step's memory "
        "| rate |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    ordered = sorted(lines, key=lambda line: -line.validation)
    return "\n".join([head, *(_line(line) for line in ordered)])


def _line(line: Line) -> str:
    first = line.runs[0]
    over = "" if line.over is None or line.over_half is None else f"{100 * line.over:+.1f} ± {_half(line.over_half)}"
    cost = statistics.median(m.step_over_floor for m in line.runs)
    cells = [
        f"`{line.row}`", f"{100 * line.accuracy:.1f} ± {_half(line.half)}", over, f"{100 * line.validation:.1f}",
        f"{first.trainable_parameters:,}", _bytes(first.stored_bytes), f"{cost:.2f}{' (cached)' if first.cached else ''}",
        _bytes(first.peak_memory_bytes), f"{first.learning_rate:g}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def verdict(lines: Sequence[Line]) -> list[str]:
    """Sentences on who beats the baseline, by the interval of the paired differences."""
    others = [(x.row, x.over, x.over_half) for x in lines if x.over is not None and x.over_half is not None]
    better = [row for row, over, half in others if over - half > 0]
    worse = [row for row, over, half in others if over + half < 0]
    unclear = [row for row, _, _ in others if row not in (*better, *worse)]
    found = []
    for names, word in ((better, f"above {called(lines)}"), (unclear, "not clearly apart from it"), (worse, "below it")):
        if names:
            found.append(f"{word[0].upper()}{word[1:]}: {', '.join(names)}.")
    best = max(lines, key=lambda line: line.validation, default=None)
    if best is not None:
        found.append(f"Chosen by validation accuracy: {best.row}, test accuracy {100 * best.accuracy:.1f} ± {_half(best.half)}.")
    return found


def write_picture(lines: Sequence[Line], title: str, path: Path) -> None:
    """Test accuracy against trained numbers; bars are 95 % intervals over seeds."""
    figure, axes = panels(8.6, 5.2)
    for line in lines:
        half = 0.0 if math.isinf(line.half) else 100 * line.half
        color = ORANGE if line.row in BASELINES else GREY if line.row.startswith(("full", "scratch")) else BLUE
        count = max(1, line.runs[0].trainable_parameters)
        axes.errorbar(count, 100 * line.accuracy, yerr=half, fmt="o", color=color, capsize=2, markersize=5, linewidth=1)
    _labels(axes, lines)
    baseline = next((line for line in lines if line.row == baseline_of([each.row for each in lines])), None)
    if baseline is not None:
        axes.axhline(100 * baseline.accuracy, color=ORANGE, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set(xlabel="trained numbers", ylabel="test accuracy, %", title=title)
    axes.grid(alpha=0.25)
    write_figure(figure, path)


def _labels(axes: Any, lines: Sequence[Line]) -> None:
    """Names beside the points, pushed apart where they would cover each other."""
    placed: list[tuple[float, float]] = []
    for line in sorted(lines, key=lambda each: -each.accuracy):
        x, y = math.log10(max(1, line.runs[0].trainable_parameters)), 100 * line.accuracy
        span = max(0.5, 100 * (max(each.accuracy for each in lines) - min(each.accuracy for each in lines)))
        lowered = y
        while any(abs(x - a) < 0.9 and abs(lowered - b) < 0.032 * span for a, b in placed):
            lowered -= 0.033 * span
        placed.append((x, lowered))
        axes.annotate(
            line.row, (10**x, y), (10 ** (x + 0.06), lowered), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": GREY} if lowered != y else None,
        )  # fmt: skip


def _half(half: float) -> str:
    return "?" if math.isinf(half) else f"{100 * half:.1f}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
