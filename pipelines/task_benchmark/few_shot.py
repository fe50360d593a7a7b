"""Few images of one task, and adapters of the other tasks: alone, fused, averaged, aligned, or one adapter for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..merge import MergeConfig, merge
from .joint import ALL, SINGLE, joint_job, single_runs
from .report import Row
from .runs import Run, Runs

BEST = "best single adapter, by validation"
TRANSFERRED = "adapter of another task, head trained"
BATCH = 8
"""Images of a step with few images."""
SIMILAR = 2
"""Adapters in a soup."""


@dataclass(frozen=True)
class Target:
    """A task with few images and the other tasks with many.

    Args:
        task: its name. `seed`: of the run. `images`: folder of its images. `others`: the adapters of the other tasks.
        folders: images of the other tasks.
    """

    task: str
    seed: int
    images: Path
    others: Mapping[str, Run]
    folders: Mapping[str, Path]


def few_shot_rows(runs: Runs, seeds: Sequence[int]) -> list[Row]:
    """A row for each way to train a task with few images. The accuracies are those of the task with few images."""
    found: dict[str, dict[str, list[Run]]] = {}
    for seed in seeds:
        for label, by_task in _runs_of_seed(runs, seed).items():
            for task, run in by_task.items():
                found.setdefault(label, {}).setdefault(task, []).append(run)
    return [Row(label, _accuracies(label, by_task), _parameters(by_task)) for label, by_task in found.items()]


def _accuracies(label: str, by_task: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    return {task: [run.test_of(task) if label == ALL else run.test for run in found] for task, found in by_task.items()}


def _parameters(by_task: Mapping[str, Sequence[Run]]) -> int:
    """Largest number of parameters that a target trains."""
    return max(found[0].parameters for found in by_task.values())


def targets_of(runs: Runs, seed: int) -> list[Target]:
    """The targets, each in turn with few images."""
    images, singles = runs.images, single_runs(runs, seed)
    targets = []
    for task in runs.targets:
        others = {name: run for name, run in singles.items() if name != task}
        targets.append(Target(task, seed, images.few(task, seed), others, {name: images.many(name, seed) for name in others}))
    return targets


def _runs_of_seed(runs: Runs, seed: int) -> dict[str, dict[str, Run]]:
    """By row, the run of each task with few images."""
    targets = {target.task: target for target in targets_of(runs, seed)}

    def row(name: str, jobs: Mapping[str, dict[str, Any]]) -> dict[str, Run]:
        return runs.row(f"few-{name}", seed, jobs)

    own = {"method": SINGLE, "lp_ft": True, **_few(runs)}
    alone = row("single", {task: {"data": str(target.images), **own} for task, target in targets.items()})
    transferred = {task: best_of(runs, target) for task, target in targets.items()}
    soups = {task: probe_soup(runs, target) for task, target in targets.items()}
    return {
        "linear probe": {task: runs.probe(f"few-probe/{task}", seed, data=str(t.images)) for task, t in targets.items()},
        f"{SINGLE}, few images alone": alone,
        TRANSFERRED: transferred,
        BEST: {task: max(alone[task], transferred[task], key=lambda run: run.validation) for task in targets},
        ALL: _joint_runs(runs, seed, targets),
        "adapter_fusion": row("fusion", {task: fusion_job(runs, t, alone[task]) for task, t in targets.items()}),
        "AdapterSoup, head trained": soups,
        "MerA": row("mera", {task: mera_job(runs, target) for task, target in targets.items()}),
    }


def _joint_runs(runs: Runs, seed: int, targets: Mapping[str, Target]) -> dict[str, Run]:
    """For each target a run with its few images and the images of all other tasks, at the rate of that with all images."""
    jobs = {task: joint_job({task: target.images, **target.folders}, SINGLE) for task, target in targets.items()}
    return runs.row("few-all", seed, jobs, f"all-{SINGLE}")


def _few(runs: Runs) -> dict[str, Any]:
    """Options of a run with few images: small batches, so that an epoch has several steps."""
    return {"epochs": runs.few_epochs, "batch": BATCH}


def best_of(runs: Runs, target: Target) -> Run:
    """The fixed adapter of another task whose features have the best logistic regression, by validation accuracy."""
    found = [
        runs.probe(f"few-transfer/{target.task}-of-{name}", target.seed, data=str(target.images), with_=(str(run.folder),))
        for name, run in target.others.items()
    ]
    return max(found, key=lambda run: run.validation)


def fusion_job(runs: Runs, target: Target, alone: Run) -> dict[str, Any]:
    """Options of AdapterFusion of the adapters of all tasks; that of the target is trained on its few images."""
    options = {"adapter_fusion": {"adapters": tuple(str(run.adapter) for run in (alone, *target.others.values()))}}
    return {"data": str(target.images), "method": "adapter_fusion", "options": options, "lp_ft": True, **_few(runs)}


def probe_soup(runs: Runs, target: Target) -> Run:
    """The logistic regression on the features of the mean of the adapters whose training images are most similar."""
    out = runs.work / "merged" / f"soup-{target.task}-{target.seed}.safetensors"
    domains = tuple(folder / "train" for folder in target.folders.values())
    _merge(target, out, method="parameters", images=target.images / "train", domains=domains, select="similarity", most=SIMILAR)
    return runs.probe(f"few-soup/{target.task}", target.seed, data=str(target.images), with_=(str(out),))


def mera_job(runs: Runs, target: Target) -> dict[str, Any]:
    """Options of a run that is initialized with the mean of the aligned adapters, and the logistic regression on its features."""
    out = runs.work / "merged" / f"mera-{target.task}-{target.seed}.safetensors"
    _merge(target, out, method="aligned")
    probe = runs.probe(f"few-aligned/{target.task}", target.seed, data=str(target.images), with_=(str(out),))
    return {"data": str(target.images), "method": SINGLE, "init_from": probe.adapter, **_few(runs)}


def _merge(target: Target, out: Path, **options: Any) -> None:
    """Merges the adapters of the other tasks without their heads, unless the file exists."""
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        merge(MergeConfig(tuple(run.adapter for run in target.others.values()), heads="drop", out=out, **options))
