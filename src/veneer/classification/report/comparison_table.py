"""Table and plot of a method comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.plot_file import panels, write_figure
from veneer.training.report.metrics import mean_interval

from ..train.comparison import RunMetrics, by_row
from .plots import BLUE, GREY, ORANGE

BASELINES = {"linear_probe": "the linear probe", "zero_shot": "zero-shot"}
"""Baseline methods in order of preference, with their names in texts."""


@dataclass(frozen=True)
class SummaryRow:
    """Metrics of one method row over its seeds.

    Args:
        row: label of the row. `seeds`: their number. `accuracy`, `half`: mean test accuracy (with several labels mean average
            precision, as everywhere here) and half its 95 % interval.
        over, over_half: mean of the differences to the baseline, paired by seed, and half its interval, or None.
        validation: mean validation accuracy of the selected epochs.
    """

    row: str
    seeds: int
    accuracy: float
    half: float
    over: float | None
    over_half: float | None
    validation: float
    runs: tuple[RunMetrics, ...]


def summarize_runs(runs: Sequence[RunMetrics], rows: Sequence[str]) -> list[SummaryRow]:
    """A summary of each row, in order."""
    baseline = baseline_of(rows)
    baselines = {m.seed: m.test_accuracy for m in by_row(runs, baseline)}
    summaries = []
    for row in rows:
        of_row = by_row(runs, row)
        accuracy = mean_interval([m.test_accuracy for m in of_row])
        differences = [m.test_accuracy - baselines[m.seed] for m in of_row if m.seed in baselines]
        over = mean_interval(differences) if differences and row != baseline else None
        validation = sum(m.val_accuracy for m in of_row) / len(of_row)
        gain, half = (None, None) if over is None else (over.mean, over.half)
        summaries.append(SummaryRow(row, len(of_row), accuracy.mean, accuracy.half, gain, half, validation, tuple(of_row)))
    return summaries


def baseline_of(rows: Sequence[str]) -> str:
    """The row that serves as the baseline; "" without one."""
    return next((row for row in BASELINES if row in rows), "")


def baseline_name(lines: Sequence[SummaryRow]) -> str:
    """Name of the baseline in texts."""
    return BASELINES.get(baseline_of([line.row for line in lines]), "a baseline")


def table(lines: Sequence[SummaryRow], metric: str = "accuracy") -> str:
    """Markdown table, sorted by the validation metric. `metric`: its name."""
    head = (
        f"| method | test {metric}, % | over {baseline_name(lines)} | validation, % | trainable parameters | adapter file "
        "| step time / frozen forward | peak memory per step | learning rate |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    ordered = sorted(lines, key=lambda line: -line.validation)
    return "\n".join([head, *(_line(line) for line in ordered)])


def _line(line: SummaryRow) -> str:
    first = line.runs[0]
    over = "" if line.over is None or line.over_half is None else f"{100 * line.over:+.1f} ± {_half(line.over_half)}"
    cost = statistics.median(m.step_over_floor for m in line.runs)
    cells = [
        f"`{line.row}`", f"{100 * line.accuracy:.1f} ± {_half(line.half)}", over, f"{100 * line.validation:.1f}",
        f"{first.trainable_parameters:,}", _bytes(first.stored_bytes), f"{cost:.2f}{' (cached)' if first.cached else ''}",
        _bytes(first.peak_memory_bytes), f"{first.learning_rate:g}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def verdict(lines: Sequence[SummaryRow], metric: str = "accuracy") -> list[str]:
    """Sentences on which methods beat the baseline, by the 95 % interval of the paired differences."""
    others = [(x.row, x.over, x.over_half) for x in lines if x.over is not None and x.over_half is not None]
    better = [row for row, over, half in others if over - half > 0]
    worse = [row for row, over, half in others if over + half < 0]
    unclear = [row for row, _, _ in others if row not in (*better, *worse)]
    baseline = baseline_name(lines)
    groups = ((better, "Better than"), (unclear, "Not clearly different from"), (worse, "Worse than"))
    sentences = [f"{word} {baseline}: {', '.join(names)}." for names, word in groups if names]
    best = max(lines, key=lambda line: line.validation, default=None)
    if best is not None:
        accuracy = f"{100 * best.accuracy:.1f} ± {_half(best.half)}"
        sentences.append(f"Best validation {metric}: {best.row}, with test {metric} {accuracy}.")
    return sentences


def comparison_page(title: str, about: str, lines: Sequence[SummaryRow], metric: str = "accuracy") -> str:
    """Markdown page of a comparison: the table and the sentences on the baseline. `about`: the data and the options."""
    return "\n".join([f"# {title}", "", about, "", table(lines, metric), "", *verdict(lines, metric), ""])


def write_accuracy_plot(lines: Sequence[SummaryRow], title: str, path: Path, metric: str = "accuracy") -> None:
    """Plots the test metric over trainable parameters; bars are 95 % intervals over seeds."""
    figure, axes = panels(8.6, 5.2)
    for line in lines:
        half = 0.0 if math.isinf(line.half) else 100 * line.half
        color = ORANGE if line.row in BASELINES else GREY if line.row.startswith(("full", "scratch")) else BLUE
        count = max(1, line.runs[0].trainable_parameters)
        axes.errorbar(count, 100 * line.accuracy, yerr=half, fmt="o", color=color, capsize=2, markersize=5, linewidth=1)
    baseline = next((line for line in lines if line.row == baseline_of([each.row for each in lines])), None)
    if baseline is not None:
        axes.axhline(100 * baseline.accuracy, color=ORANGE, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    _labels(axes, lines)
    axes.set(xlabel="trainable parameters", ylabel=f"test {metric}, %", title=title)
    axes.grid(alpha=0.25)
    write_figure(figure, path)


def _labels(axes: Any, lines: Sequence[SummaryRow]) -> None:
    """Labels the points to their right, moved down where labels would overlap."""
    left, right = (math.log10(limit) for limit in axes.get_xlim())
    right += 0.15 * (right - left)  # for the labels of the largest
    axes.set_xlim(10**left, 10**right)
    low, high = axes.get_ylim()
    character_width, line_height = (right - left) / 95, 0.032 * (high - low)
    placed: list[tuple[float, float, int]] = []
    for line in sorted(lines, key=lambda each: -each.accuracy):
        x, y = math.log10(max(1, line.runs[0].trainable_parameters)) + 1.5 * character_width, 100 * line.accuracy
        lowered = y
        while any(
            a - character_width * len(line.row) < x < a + character_width * n and abs(lowered - b) < line_height
            for a, b, n in placed
        ):
            lowered -= line_height
        placed.append((x, lowered, len(line.row)))
        axes.annotate(
            line.row, (10 ** (x - 1.5 * character_width), y), (10**x, lowered), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": GREY} if lowered != y else None,
        )  # fmt: skip


def _half(half: float) -> str:
    return "?" if math.isinf(half) else f"{100 * half:.1f}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
