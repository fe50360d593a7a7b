"""Tables of the benchmark: means with 95 % intervals over seeds, and differences that are paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.training.report.metrics import MeanInterval, mean_interval


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        label: its name. `accuracies`: test accuracy of each task, by seed, 0 to 1. `parameters`: trained parameters.
    """

    label: str
    accuracies: Mapping[str, Sequence[float]]
    parameters: int

    @property
    def means(self) -> list[float]:
        """Mean accuracy of the tasks, by seed."""
        return [sum(each) / len(each) for each in zip(*self.accuracies.values(), strict=True)]

    def over(self, other: Row, task: str | None = None) -> MeanInterval:
        """Difference to another row, paired by seed: of the mean accuracy, or of one task."""
        own, others = (row.means if task is None else row.accuracies[task] for row in (self, other))
        return mean_interval([a - b for a, b in zip(own, others, strict=True)])


def as_json(rows: Sequence[Row], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as JSON values. `baselines`: labels of the rows that others are compared with."""
    by_label = {row.label: row for row in rows}
    return [
        {
            "row": row.label,
            "test_accuracy": {task: list(values) for task, values in row.accuracies.items()},
            "mean": _interval(mean_interval(row.means)),
            "over": {label: _interval(row.over(by_label[label])) for label in baselines if label != row.label},
            "trained_parameters": row.parameters,
        }
        for row in rows
    ]


def _interval(value: MeanInterval) -> dict[str, float | None]:
    return {"mean": value.mean, "low": value.low, "high": value.high}


def table(rows: Sequence[Row], baselines: Mapping[str, str], task: str | None = None) -> str:
    """Markdown table in percent.

    Args:
        baselines: label of a row to the head of the column with the differences to it.
        task: whose accuracy is compared, and no mean is shown (default: the mean of the tasks).
    """
    tasks, by_label = [*rows[0].accuracies], {row.label: row for row in rows}
    head = ["", *tasks, *(["mean"] if task is None else []), *baselines.values(), "trained parameters"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        cells = [percent(mean_interval(row.accuracies[each])) for each in tasks]
        cells += [percent(mean_interval(row.means))] if task is None else []
        cells += ["" if label == row.label else percent(row.over(by_label[label], task), "+") for label in baselines]
        lines.append([row.label, *cells, f"{row.parameters:,}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: MeanInterval, sign: str = "") -> str:
    """`62.1 ± 1.4`, in percent; the mean alone without an interval."""
    half = "" if value.high is None else f" ± {100 * value.half:.1f}"
    return f"{100 * value.mean:{sign}.1f}{half}"
