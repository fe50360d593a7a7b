"""Results of a search: the table of the Pareto front, the comparison at the same budget, and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.plot_file import panels, write_figure

from ..report.plots import BLUE, GREY, ORANGE
from .evolution import Trial, pareto_front
from .sub_network import SubNetwork


@dataclass(frozen=True)
class TrainedRow:
    """A trained run of the comparison at the same budget.

    Args:
        label: `search`, or the method that has one size in all blocks. `sizes`: sizes of the methods.
        parameters: trainable parameters without the head.
        val_accuracy, test_accuracy, test_interval_95: of the run. `folder`: of the run.
    """

    label: str
    sizes: str
    parameters: int
    val_accuracy: float
    test_accuracy: float
    test_interval_95: tuple[float, float]
    folder: str


def read_row(label: str, sub: SubNetwork, names: Sequence[str], parameters: int, folder: Path) -> TrainedRow:
    """The row of a finished run, from its `result.json`."""
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    low, high = record["test_interval_95"]
    return TrainedRow(
        label, sub.text(names), parameters, record["val_accuracy"], record["test_accuracy"], (low, high), folder.name
    )


def search_record(trials: Sequence[Trial], names: Sequence[str], rows: Sequence[TrainedRow]) -> dict[str, Any]:
    """Content of `result.json`: the Pareto front, and the rows of the comparison."""
    front = [
        {"sizes": t.sub.as_dict(names), "parameters": t.parameters, "val_accuracy": t.val_accuracy, "val_loss": t.val_loss}
        for t in pareto_front(trials)
    ]
    return {"trials": len(trials), "front": front, "rows": [asdict(row) for row in rows]}


def search_page(
    title: str, about: str, trials: Sequence[Trial], names: Sequence[str], rows: Sequence[TrainedRow], best: Trial
) -> str:
    """Markdown page of a search. `about`: the data and the options."""
    lines = [f"# {title}", "", about, "", "## Pareto front of the trials", ""]
    lines += ["| parameters | validation accuracy, % | sub-network |", "|---:|---:|---|"]
    for trial in pareto_front(trials):
        mark = " (chosen)" if trial == best else ""
        lines.append(f"| {trial.parameters:,} | {_percent(trial.val_accuracy)} | {trial.sub.text(names)}{mark} |")
    lines += ["", "## Trained at the same budget", ""]
    lines += ["| row | parameters | validation accuracy, % | test accuracy, % (95 % interval) | sizes | folder |"]
    lines += ["|---|---:|---:|---:|---|---|"]
    for row in rows:
        low, high = row.test_interval_95
        test = f"{_percent(row.test_accuracy)} ({_percent(low)} to {_percent(high)})"
        lines.append(
            f"| {row.label} | {row.parameters:,} | {_percent(row.val_accuracy)} | {test} | {row.sizes} | `{row.folder}` |"
        )
    return "\n".join([*lines, ""])


def write_pareto_plot(trials: Sequence[Trial], best: Trial, budget: int, title: str, path: Path) -> None:
    """Plots the validation accuracy of the trials over their parameters, the Pareto front, the chosen trial and the budget."""
    figure, axes = panels(7.2, 4.6)
    scored = [trial for trial in trials if trial.val_accuracy is not None]
    axes.plot(*_points(scored), "o", color=GREY, alpha=0.5, markersize=4, label="trials")
    axes.step(*_points(pareto_front(trials)), where="post", color=BLUE, marker="o", markersize=5, label="Pareto front")
    axes.plot(*_points([best]), "D", color=ORANGE, markersize=8, label="chosen")
    axes.axvline(budget, color=ORANGE, linestyle="--", linewidth=0.8, label="budget")
    axes.set_xscale("log")
    axes.set(xlabel="trainable parameters without the head", ylabel="validation accuracy, %", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def _points(trials: Sequence[Trial]) -> tuple[list[int], list[float]]:
    return [trial.parameters for trial in trials], [100 * (trial.val_accuracy or 0.0) for trial in trials]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
