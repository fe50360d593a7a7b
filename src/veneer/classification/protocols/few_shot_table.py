"""Table of few-shot curves: accuracy of each method for each number of training images per class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..report.comparison_table import BASELINES, SummaryRow, baseline_of, summarize_runs
from ..train.comparison import RunMetrics


def summarize_few_shot(runs: Mapping[int, Sequence[RunMetrics]]) -> list[dict[str, Any]]:
    """One record for each row and number of shots, in this order.

    A record has `row`, `shots`, `seeds` (their number), the mean test accuracy (0 to 1) as `accuracy` and half its 95 % interval
    over seeds as `half`, the mean difference to the baseline, paired by seed, as `over` and half its interval as `over_half`,
    `validation`, `trainable_parameters` and `learning_rate`; without a baseline or with one seed, what needs them is None.

    Args:
        runs: number of shots to its runs.
    """
    rows = dict.fromkeys(run.row for of_shots in runs.values() for run in of_shots)
    records = [
        _record(summary, shots)
        for shots, of_shots in sorted(runs.items())
        for summary in summarize_runs(of_shots, [row for row in rows if any(run.row == row for run in of_shots)])
    ]
    order = {row: number for number, row in enumerate(rows)}
    return sorted(records, key=lambda record: order[record["row"]])


def _record(summary: SummaryRow, shots: int) -> dict[str, Any]:
    first = summary.runs[0]
    return {
        "row": summary.row,
        "shots": shots,
        "seeds": summary.seeds,
        "accuracy": summary.accuracy,
        "half": _finite(summary.half),
        "over": summary.over,
        "over_half": _finite(summary.over_half),
        "validation": summary.validation,
        "trainable_parameters": first.trainable_parameters,
        "learning_rate": first.learning_rate,
    }


def _finite(half: float | None) -> float | None:
    return None if half is None or math.isinf(half) else half


def few_shot_page(title: str, about: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown page: test accuracies by shots, and the differences to the baseline if there is one.

    Args:
        about: sentences on the data and the options. `records`: of `summarize_few_shot`.
    """
    baseline = baseline_of([record["row"] for record in records])
    lines = [f"# {title}: few-shot curves", "", about, "", "## Test accuracy, %", "", *_table(records, "accuracy", "half")]
    if baseline:
        others = [record for record in records if record["row"] != baseline]
        lines += ["", f"## Over {BASELINES[baseline]}, points", "", *_table(others, "over", "over_half", "+")]
    return "\n".join([*lines, ""])


def _table(records: Sequence[Mapping[str, Any]], value: str, half: str, sign: str = "") -> list[str]:
    """A line for each row and a column for each number of shots; the highest mean validation accuracy first."""
    shots = sorted({record["shots"] for record in records})
    by_row: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["shots"]] = record
    ordered = sorted(by_row.items(), key=lambda item: -fmean(record["validation"] for record in item[1].values()))
    head = ["method", *(f"{count} shot{'s' * (count > 1)}" for count in shots), "trainable parameters", "learning rate"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row, of_row in ordered:
        cells = [_cell(of_row.get(count), value, half, sign) for count in shots]
        last = of_row[max(of_row)]
        rate = f"{last['learning_rate']:g}" if last["trainable_parameters"] else ""
        count = f"{last['trainable_parameters']:,}"
        lines.append(f"| {' | '.join([f'`{row}`', *cells, count, rate])} |")
    return lines


def _cell(record: Mapping[str, Any] | None, value: str, half: str, sign: str) -> str:
    if record is None or record[value] is None:
        return ""
    interval = "" if record[half] is None else f" ± {100 * record[half]:.1f}"
    return f"{100 * record[value]:{sign}.1f}{interval}"
