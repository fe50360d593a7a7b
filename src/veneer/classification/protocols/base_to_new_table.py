"""Table of generalization from base to new classes: accuracy on both, and their harmonic mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from veneer.training.report.metrics import mean_interval

from .benchmark_tasks import Protocol
from .protocol_table import TaskRun

AVERAGE = "average"
"""Key of the mean over the tasks."""


def summarize_base_to_new(protocol: Protocol | None, runs: Sequence[TaskRun]) -> list[dict[str, Any]]:
    """One record for each number of shots and row: `tasks`, task or `average` to `base`, `new` and `harmonic_mean`, 0 to 1.

    Accuracies are means over seeds, and of `average` over the tasks. The harmonic mean is 2 b n / (b + n) of these means. `half`
    has the same keys, with half the 95 % interval over seeds; of the harmonic mean that of the seeds' harmonic means. With one
    seed it is None.

    Args:
        protocol: None for data of no benchmark.

    Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, table 1.
    """
    keys = dict.fromkeys((run.shots, run.row) for run in runs)
    return [_record([run for run in runs if (run.shots, run.row) == key], key) for key in keys]


def _record(runs: Sequence[TaskRun], key: tuple[int | None, str]) -> dict[str, Any]:
    tasks = {task: _scores([run for run in runs if run.task == task]) for task in dict.fromkeys(run.task for run in runs)}
    means = (fmean(scores[name] for scores in tasks.values()) for name in ("base", "new"))
    halves = {task: _halves([run for run in runs if run.task == task]) for task in tasks} | {AVERAGE: _halves(runs)}
    return {"shots": key[0], "row": key[1], "tasks": {**tasks, AVERAGE: _with_harmonic_mean(*means)}, "half": halves}


def _halves(runs: Sequence[TaskRun]) -> dict[str, float] | None:
    """Half the intervals over seeds of the means over tasks; None with one seed."""
    seeds = [_scores([run for run in runs if run.seed == seed]) for seed in dict.fromkeys(run.seed for run in runs)]
    return {name: mean_interval([scores[name] for scores in seeds]).half for name in seeds[0]} if len(seeds) > 1 else None


def _scores(runs: Sequence[TaskRun]) -> dict[str, float]:
    new = [run.new_accuracy for run in runs if run.new_accuracy is not None]
    return _with_harmonic_mean(fmean(run.test_accuracy for run in runs), fmean(new))


def _with_harmonic_mean(base: float, new: float) -> dict[str, float]:
    return {"base": base, "new": new, "harmonic_mean": 2 * base * new / (base + new) if base + new else 0.0}


def base_to_new_page(protocol: Protocol | None, records: Sequence[Mapping[str, Any]], about: str) -> str:
    """Markdown page: a table for each number of shots, with a line for each task and method."""
    lines = [f"# {protocol.name}: base to new classes" if protocol else "# Base to new classes", "", about, ""]
    for shots in dict.fromkeys(record["shots"] for record in records):
        of_shots = [record for record in records if record["shots"] == shots]
        lines += [f"## {shots} training images per class", "", "| task | method | base | new | harmonic mean |"]
        lines += ["|---|---|---:|---:|---:|"]
        tasks = dict.fromkeys(task for record in of_shots for task in record["tasks"] if task != AVERAGE)
        shown = (*tasks, AVERAGE) if protocol else tasks
        lines += [_line(task, record) for task in shown for record in of_shots if task in record["tasks"]]
        lines += [""]
    return "\n".join(lines)


def _line(task: str, record: Mapping[str, Any]) -> str:
    scores, halves = record["tasks"][task], record["half"][task]
    cells = [f"{100 * value:.1f}" + (f" ± {100 * halves[name]:.1f}" if halves else "") for name, value in scores.items()]
    return f"| {task} | `{record['row']}` | {' | '.join(cells)} |"
