"""All tasks in one run: HyperFormer, HyperFormer++ and a shared adapter, compared with one adapter for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row
from .runs import Run, Runs

SINGLE = "pfeiffer"
"""Method of the adapters of single tasks."""
SHARED = ("pfeiffer", "hyperformer", "hyperformer_plus_plus")
"""Methods that are trained on all tasks in one run."""
EACH = f"{SINGLE}, one for each task"
ALL = f"{SINGLE}, one for all tasks"


def joint_job(folders: dict[str, Path], method: str) -> dict[str, Any]:
    """Options of a run with several tasks."""
    first, *others = [f"{name}={folder}" for name, folder in folders.items()]
    return {"method": method, "data": first, "more_data": tuple(others), "tasks": True}


def single_runs(runs: Runs, seed: int) -> dict[str, Run]:
    """The adapter of each task, trained on its images alone."""
    images = runs.images
    jobs = {task: {"method": SINGLE, "data": str(images.many(task, seed))} for task in images.tasks}
    return runs.row("single", seed, jobs)


def joint_rows(runs: Runs, seeds: Sequence[int]) -> list[Row]:
    """A row for the single adapters, and one for each method with all tasks in one run."""
    tasks = runs.images.tasks
    singles = [single_runs(runs, seed) for seed in seeds]
    accuracies = {task: [each[task].test for each in singles] for task in tasks}
    rows = [Row(EACH, accuracies, sum(run.parameters for run in singles[0].values()))]
    for method in SHARED:
        found = [shared_run(runs, seed, method) for seed in seeds]
        accuracies = {task: [run.test_of(task) for run in found] for task in tasks}
        rows.append(Row(f"{method}, one for all tasks", accuracies, found[0].parameters))
    return rows


def shared_run(runs: Runs, seed: int, method: str) -> Run:
    """One run with many images of all tasks."""
    folders = {task: runs.images.many(task, seed) for task in runs.images.tasks}
    return runs.row(f"all-{method}", seed, {"all": joint_job(folders, method)})["all"]
