"""Training with several tasks: each step has images of one task, and the mean score of all tasks selects the epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..models.linear_probe_init import Head, solve_head
from ..objectives.objective import Baseline, Metrics
from ..train.attach_methods import adapters_disabled
from ..train.batches import Batch, ClassifyingLoss, logits_of
from ..train.train import ClassifierTrainer
from .sampling import TaskOrder, TaskSchedule, task_probabilities
from .task import Task


@dataclass(frozen=True)
class MeanMetrics:
    """Metrics of several tasks, with their means. `by_task`: metrics by the name of the task."""

    by_task: Mapping[str, Metrics]

    @property
    def score(self) -> float:
        """Mean score of the tasks."""
        return sum(each.score for each in self.by_task.values()) / len(self.by_task)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean: the half-widths of the tasks, which have different images, add as squares."""
        low, high = (
            sum((each.score - each.interval[side]) ** 2 for each in self.by_task.values()) ** 0.5 / len(self.by_task)
            for side in (0, 1)
        )
        return self.score - low, self.score + high

    @property
    def loss(self) -> float:
        """Mean loss of the tasks."""
        return sum(each.loss for each in self.by_task.values()) / len(self.by_task)

    @property
    def images(self) -> int:
        """Number of images of all tasks."""
        return sum(each.images for each in self.by_task.values())

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """The mean, and the metrics of each task; `classes` are those of all tasks, `TASK/CLASS`."""
        names = {task: [each.partition("/")[2] for each in classes if each.startswith(f"{task}/")] for task in self.by_task}
        return {"score": self.score, "tasks": {task: each.as_dict(names[task]) for task, each in self.by_task.items()}}

    def baseline(self) -> Baseline:
        """Mean of the baselines of the tasks."""
        each = [metrics.baseline() for metrics in self.by_task.values()]
        value = sum(baseline.value for baseline in each) / len(each)
        reason = f"The mean of the test scores is {self.score:.1%}; the mean of their baselines is {value:.1%}."
        return Baseline(value, reason, "The mean of the test scores is not clearly above that of predictions without images.")


class TaskLoss:
    """Loss of a step: that of its task's images, by the columns of the logits that are its head.

    Args:
        loss: of the model with all heads; its inputs, order and logits are changed to those of the tasks.
        schedule, order: the task of each step, and its images.
        weights: weights of the classes of each task, or None.
        select: called with the task of a step before its forward pass.
    """

    def __init__(
        self,
        loss: ClassifyingLoss,
        tasks: Sequence[Task],
        schedule: TaskSchedule,
        order: TaskOrder,
        weights: Sequence[Tensor | None],
        select: Callable[[Task], None],
    ) -> None:
        self.loss, self.tasks, self.schedule, self.weights, self.select = loss, tuple(tasks), schedule, weights, select
        self.task = self.tasks[0]
        self._logits, self._inputs = loss.logits, loss.inputs
        loss.order, loss.logits, loss.inputs = order, self._task_logits, self._task_inputs

    def __call__(self, step: int, rows: list[int]) -> Tensor:
        index = self.schedule.task(step)
        self.task = self.tasks[index]
        self.loss.class_weights = self.weights[index]
        self.select(self.task)
        return self.loss(step, rows)

    def _task_logits(self, inputs: Tensor) -> Tensor:
        return self._logits(inputs)[:, self.task.rows]

    def _task_inputs(self, samples: Sequence[tuple[int, int]]) -> Batch:
        inputs, labels = self._inputs(samples)
        return inputs, labels - self.task.start


class TaskTrainer(ClassifierTrainer):
    """Trains the adapters of a classifier on several tasks. `predict` is that of one task, `metrics` those of all."""

    @cached_property
    def probabilities(self) -> dict[str, float]:
        """Probability of each task in a step."""
        data = self.views.data
        sizes = [len(task.indices(data.splits.train)) for task in data.tasks]
        values = task_probabilities(sizes, self.config.task_temperature)
        return {task.name: value for task, value in zip(data.tasks, values, strict=True)}

    def loss(self) -> TaskLoss:  # type: ignore[override]
        """Training loss of the tasks."""
        data, loss = self.views.data, super().loss()
        schedule = TaskSchedule([*self.probabilities.values()], self.config.seed)
        order = TaskOrder(data.tasks, data.splits.train, schedule, loss.samples, self.config.seed)
        return TaskLoss(loss, data.tasks, schedule, order, self._weights_of_tasks(), self.select)

    def select(self, task: Task) -> None:
        """Selects a task in the methods that distinguish tasks."""
        for attachment in self.attached:
            attachment.task = task.name

    def metrics(self, split: str) -> MeanMetrics:
        """Metrics of each task on a split with the current weights."""
        data = self.views.data
        return MeanMetrics({task.name: data.objective.metrics(*self.predict_task(split, task)) for task in data.tasks})

    def predict_task(self, split: str, task: Task) -> Batch:
        """Logits (N, classes) and labels of a task's images in a split."""
        self.select(task)
        indices, device = task.indices(getattr(self.views.data.splits, split)), self.accelerator.device
        if self.features is not None:
            logits, labels = logits_of(self.features.head, [self.features([(0, i) for i in indices])], device, self.dtype)
        else:
            batches = self.views.plain.batches(indices, self.config.batch)
            logits, labels = logits_of(self.model, batches, device, self.dtype)
        return logits[:, task.rows], labels - task.start

    def probe_head(self) -> Head:
        """Weight and bias of the logistic regressions of all tasks on the frozen model's features."""
        data = self.views.data
        heads = list[Head]()
        with adapters_disabled(self.attached):
            self._frozen.compute(("train", "validation"))
        for task in data.tasks:
            parts = [task.indices(split) for split in (data.splits.train, data.splits.validation)]
            train, validation = (self._frozen([(0, index) for index in indices]) for indices in parts)
            local = [(features, labels - task.start) for features, labels in (train, validation)]
            heads.append(solve_head(local[0], local[1], len(task.classes), data.objective))
        return torch.cat([weight for weight, _ in heads]), torch.cat([bias for _, bias in heads])

    def _weights_of_tasks(self) -> list[Tensor | None]:
        """Weights of the classes in the loss of each task, by its training images."""
        data = self.views.data
        if self.config.class_weights == "none":
            return [None] * len(data.tasks)
        labels = data.targets("train")
        own = [labels[(labels >= task.rows.start) & (labels < task.rows.stop)] - task.start for task in data.tasks]
        weights = [data.objective.class_weights(each, len(task.classes)) for each, task in zip(own, data.tasks, strict=True)]
        return [each.to(self.accelerator.device) for each in weights]
