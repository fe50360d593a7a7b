"""The task of each step, and the order of its images: pure functions of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.training.loop.seeds import generator, mix

from ..train.batches import Order, SampleOrder
from .task import Task


def task_probabilities(sizes: Sequence[int], temperature: float) -> list[float]:
    """n_t^(1/T) / Σ n_s^(1/T) of tasks with n_t training images.

    Args:
        temperature: T, above 0: 1 samples in proportion to the sizes, a high one all tasks equally.
    Source: Karimi Mahabadi et al., ACL 2021, section 3.
    """
    weights = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]


class TaskSchedule:
    """The task of each step, sampled independently for each.

    Args:
        probabilities: of the tasks. `seed`: of the run.
    """

    def __init__(self, probabilities: Sequence[float], seed: int) -> None:
        self.probabilities, self.seed = tuple(probabilities), seed
        self._tasks: list[int] = []
        self._earlier: list[int] = []
        self._counts = [0] * len(self.probabilities)

    def task(self, step: int) -> int:
        """Index of the task of a step."""
        self._extend(step)
        return self._tasks[step]

    def earlier(self, step: int) -> int:
        """Number of the earlier steps with the task of this step."""
        self._extend(step)
        return self._earlier[step]

    def _extend(self, step: int) -> None:
        for number in range(len(self._tasks), step + 1):
            uniform = torch.rand((), generator=generator(self.seed, "task", number), dtype=torch.float64).item()
            bounds = torch.tensor(self.probabilities, dtype=torch.float64).cumsum(0)
            task = min(int((bounds <= uniform).sum()), len(bounds) - 1)
            self._tasks.append(task)
            self._earlier.append(self._counts[task])
            self._counts[task] += 1


class TaskOrder(SampleOrder):
    """Order of the samples of a run: those of a step are of one task, whose images are shuffled anew in each epoch.

    Args:
        tasks: the tasks. `train`: training images of all tasks.
        schedule: the task of each step. `samples`: samples of a step. `seed`: of the permutations.
    """

    def __init__(self, tasks: Sequence[Task], train: Sequence[int], schedule: TaskSchedule, samples: int, seed: int) -> None:
        self.schedule, self.samples = schedule, samples
        self.orders = [Order(task.indices(train), mix(seed, "task", task.name)) for task in tasks]

    def at(self, number: int) -> tuple[int, int]:
        """(epoch of the task, image) of a sample."""
        step, row = divmod(number, self.samples)
        return self.orders[self.schedule.task(step)].at(self.schedule.earlier(step) * self.samples + row)
