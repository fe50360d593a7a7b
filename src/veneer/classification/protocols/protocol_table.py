"""Table of a protocol: accuracy of each method on each task, means of groups, and the mean of groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from veneer.training.report.metrics import mean_interval

from ..train.comparison import RunMetrics
from .benchmark_tasks import Protocol


@dataclass(frozen=True)
class TaskRun:
    """Test accuracy of one run.

    Args:
        task: its folder name in the protocol. `row`, `seed`: of the run. `shots`: training images per class, or None.
        new_accuracy: test accuracy on new classes, or None.
    """

    task: str
    row: str
    seed: int
    shots: int | None
    test_accuracy: float
    new_accuracy: float | None = None


def task_runs(task: str, shots: int | None, runs: Sequence[RunMetrics]) -> list[TaskRun]:
    """The runs of a comparison on one task."""
    return [TaskRun(task, run.row, run.seed, shots, run.test_accuracy, run.new_accuracy) for run in runs]


def summarize(protocol: Protocol, runs: Sequence[TaskRun]) -> list[dict[str, Any]]:
    """One record for each number of shots and row: `tasks`, `groups`, `mean_of_groups` and `half`, of accuracies 0 to 1.

    `tasks` has the mean over seeds of each task, `groups` the mean over the tasks of each group. `mean_of_groups` is the mean of
    the group means, `half` half its 95 % interval over seeds. A group without a run has no mean, and then there is no mean of
    groups.
    """
    keys = dict.fromkeys((run.shots, run.row) for run in runs)
    return [_record(protocol, [run for run in runs if (run.shots, run.row) == key], key) for key in keys]


def _record(protocol: Protocol, runs: Sequence[TaskRun], key: tuple[int | None, str]) -> dict[str, Any]:
    tasks = {name: _mean([r.test_accuracy for r in runs if r.task == name]) for name in _names(protocol)}
    groups = _groups(protocol, tasks)
    by_seed = [_mean_of_groups(protocol, [r for r in runs if r.seed == seed]) for seed in sorted({r.seed for r in runs})]
    complete = [mean for mean in by_seed if mean is not None]
    interval = mean_interval(complete) if complete and len(complete) == len(by_seed) else None
    shots, row = key
    return {
        "shots": shots,
        "row": row,
        "tasks": tasks,
        "groups": groups,
        "mean_of_groups": None if interval is None else interval.mean,
        "half": None if interval is None or len(complete) == 1 else interval.half,
    }


def _mean_of_groups(protocol: Protocol, runs: Sequence[TaskRun]) -> float | None:
    groups = _groups(protocol, {name: _mean([r.test_accuracy for r in runs if r.task == name]) for name in _names(protocol)})
    means = [mean for mean in groups.values() if mean is not None]
    return fmean(means) if len(means) == len(groups) else None


def _groups(protocol: Protocol, tasks: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        group: _mean([mean for name in names if (mean := tasks[name]) is not None]) for group, names in protocol.groups.items()
    }


def _names(protocol: Protocol) -> list[str]:
    return [name for names in protocol.groups.values() for name in names]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def protocol_page(protocol: Protocol, records: Sequence[Mapping[str, Any]], about: str) -> str:
    """Markdown page: a table for each number of shots, with the tasks that have runs, and the missing tasks."""
    lines = [f"# {protocol.name}", "", about, ""]
    for shots in dict.fromkeys(record["shots"] for record in records):
        lines += [] if shots is None else [f"## {shots} training images per class", ""]
        lines += [*_table(protocol, [record for record in records if record["shots"] == shots]), ""]
    missing = [name for name in _names(protocol) if all(record["tasks"][name] is None for record in records)]
    if missing:
        lines += [f"Without {', '.join(missing)}: means are of the other tasks.", ""]
    return "\n".join(lines)


def _table(protocol: Protocol, records: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = [name for name in _names(protocol) if any(record["tasks"][name] is not None for record in records)]
    groups = [*protocol.groups] if len(protocol.groups) > 1 else []
    mean = "mean of groups" if groups else "mean"
    head = ["method", *tasks, *groups, mean]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for record in records:
        cells = [_cell(record["tasks"][name]) for name in tasks] + [_cell(record["groups"][name]) for name in groups]
        half = "" if record["half"] is None else f" ± {100 * record['half']:.1f}"
        label = f"`{record['row']}`"
        rows.append(f"| {' | '.join([label, *cells, _cell(record['mean_of_groups']) + half])} |")
    return rows


def _cell(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f}"
