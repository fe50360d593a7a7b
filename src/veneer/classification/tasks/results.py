"""Result files of a run with several tasks."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from veneer.atomic_files import write_json
from veneer.injection import Attachment
from veneer.training.loop.disk_space import writing
from veneer.training.report.verdict import Verdict, read_verdict

from ..config import TransferConfig
from ..data.run_data import Data
from ..models.classifier import Classifier
from ..objectives.objective import Evaluation
from ..report.artifacts import run_record, write_files
from ..report.plots import write_curves
from ..report.verdict import Evidence, verdict
from ..train.train import TransferResult
from .task import Task
from .trainer import MeanMetrics, TaskTrainer

OUTCOMES = ("not_learned", "overfitted", "partly", "learned")
"""Outcomes of verdicts, worst first."""


def write_task_results(
    config: TransferConfig,
    data: Data,
    classifier: Classifier,
    attached: Sequence[Attachment],
    trainer: TaskTrainer,
    result: TransferResult,
) -> dict[str, Any]:
    """Evaluates the test split of each task, once, and writes the files of `write_results`; the plots of a task in `tasks/NAME`.

    Returns:
        The content of `result.json`.
    """
    out, validation = trainer.folder, result.validation
    assert result.best is not None
    assert isinstance(validation, MeanMetrics)
    stored = write_files(config, data, classifier, attached, out)
    predictions = {task.name: trainer.predict_task("test", task) for task in data.tasks}
    test = MeanMetrics({name: data.objective.metrics(*each) for name, each in predictions.items()})
    write_curves(result.loop.losses, result.epochs, result.best, out / "curves.png", f"mean {data.objective.metric}")
    for task in data.tasks:
        evaluation = Evaluation(*predictions[task.name], task.classes, _reader(data, task))
        folder = out / "tasks" / task.name
        folder.mkdir(parents=True, exist_ok=True)
        data.objective.write_plots(evaluation, test.by_task[task.name], folder)
    verdicts = {name: verdict(Evidence(test.by_task[name], validation.by_task[name]), config) for name in test.by_task}
    record = run_record(config, data, classifier, attached, result, test) | {"stored_bytes": stored, "search": None}
    record["tasks"] = {task.name: _entry(data, trainer, task, test, validation, verdicts[task.name]) for task in data.tasks}
    record["verdict"] = worst_verdict(verdicts).as_dict()
    with writing(out, "result.json"):
        write_json(out / "result.json", record)
    return record


def _entry(
    data: Data, trainer: TaskTrainer, task: Task, test: MeanMetrics, validation: MeanMetrics, own: Verdict
) -> dict[str, Any]:
    """Entry of a task in `result.json`."""
    key, splits = data.objective.key, data.splits
    return {
        f"test_{key}": test.by_task[task.name].score,
        "test_interval_95": list(test.by_task[task.name].interval),
        f"val_{key}": validation.by_task[task.name].score,
        "classes": list(task.classes),
        "images": {name: len(task.indices(getattr(splits, name))) for name in ("train", "validation", "test")},
        "probability": trainer.probabilities[task.name],
        "verdict": own.as_dict(),
    }


def worst_verdict(verdicts: dict[str, Verdict]) -> Verdict:
    """The verdict of the run: the worst outcome of its tasks, named if the others have a better one, with the reasons of each."""
    name, worst = min(verdicts.items(), key=lambda item: OUTCOMES.index(item[1].outcome))
    reasons = tuple(f"{task}: {reason}" for task, each in verdicts.items() for reason in each.reasons)
    summary = worst.summary if {each.outcome for each in verdicts.values()} == {worst.outcome} else f"{name}: {worst.summary}"
    return Verdict(worst.outcome, summary, reasons, worst.advice)


def _reader(data: Data, task: Task) -> Callable[[int], Image.Image]:
    """Reads the image of a row of a task's test images."""
    images = [data.source.examples[index] for index in task.indices(data.splits.test)]
    return lambda row: data.source.read(images[row])


def task_plan(trainer: TaskTrainer) -> list[str]:
    """Lines on the tasks before training."""
    data, temperature = trainer.views.data, trainer.config.task_temperature
    return [
        f"task {task.name}: {len(task.classes)} classes, {len(task.indices(data.splits.train)):,} training images, "
        f"{trainer.probabilities[task.name]:.1%} of the steps (temperature {temperature:g})"
        for task in data.tasks
    ]


def task_summary(record: dict[str, Any], data: Data, out: Path) -> str:
    """Metrics of each task, their mean, the verdict and the next command."""
    key, metric = data.objective.key, data.objective.metric
    lines = []
    for name, task in record["tasks"].items():
        low, high = task["test_interval_95"]
        scores = f"test {metric} {task[f'test_{key}']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        lines.append(f"{name}: {scores}, validation {metric} {task[f'val_{key}']:.1%}")
    lines.append(
        f"mean: test {metric} {record[f'test_{key}']:.1%}, validation {metric} {record[f'val_{key}']:.1%}, epoch "
        f"{record['chosen']['epoch']}; {record['trainable_parameters']:,} trainable parameters, adapter of "
        f"{record['stored_bytes']:,} bytes in {out}"
    )
    lines.append(read_verdict(record).text())
    lines.append(
        f"classify images: veneer predict {shlex.quote(str(out))} IMAGE … --task {shlex.quote(next(iter(record['tasks'])))}"
    )
    return "\n".join(lines)
