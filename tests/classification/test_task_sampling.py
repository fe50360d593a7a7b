"""The task of each step, the order of its images, and the loss of its head against an explicit cross-entropy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.raising import raises
from veneer.classification.tasks.sampling import TaskOrder, TaskSchedule, task_probabilities
from veneer.classification.tasks.task import Task, rows_of, task_sources
from veneer.classification.tasks.trainer import TaskLoss
from veneer.classification.train.batches import ClassifyingLoss, Order
from veneer.injection.errors import OptionError

TASKS = (Task("cats", ("a", "b"), 0, (0, 6)), Task("dogs", ("a", "b", "c"), 2, (6, 10)))


def test_probabilities_are_powers_of_the_sizes() -> None:
    assert task_probabilities([300, 100], 1) == pytest.approx([0.75, 0.25])
    roots = 300**0.1, 100**0.1
    assert task_probabilities([300, 100], 10) == pytest.approx([r / sum(roots) for r in roots])
    assert task_probabilities([10**6, 1], 0.01) == pytest.approx([1, 0])


def test_the_task_of_a_step_depends_on_seed_and_step_only() -> None:
    schedule = TaskSchedule([0.7, 0.2, 0.1], seed=3)
    tasks = [schedule.task(step) for step in range(3000)]
    shares = {task: count / 3000 for task, count in Counter(tasks).items()}
    assert shares == pytest.approx({0: 0.7, 1: 0.2, 2: 0.1}, abs=0.03)
    late = TaskSchedule([0.7, 0.2, 0.1], seed=3)
    assert [late.task(step) for step in (2999, 17, 5)] == [tasks[step] for step in (2999, 17, 5)]
    assert late.earlier(2999) == tasks[:2999].count(tasks[2999])
    assert [TaskSchedule([0.7, 0.2, 0.1], seed=4).task(step) for step in range(50)] != tasks[:50]


def test_each_task_shuffles_its_own_images() -> None:
    schedule = TaskSchedule([0.5, 0.5], seed=0)
    order = TaskOrder(TASKS, [0, 1, 2, 4, 6, 7, 9], schedule, samples=2, seed=0)
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for step in range(40):
        seen[schedule.task(step)] += [order.at(2 * step), order.at(2 * step + 1)]
    for task, images in ((0, [0, 1, 2, 4]), (1, [6, 7, 9])):
        for epoch in range(5):
            own = seen[task][epoch * len(images) : (epoch + 1) * len(images)]
            assert sorted(own) == [(epoch, image) for image in images]
    assert TaskOrder(TASKS, [0, 1, 2, 4, 6, 7, 9], schedule, 2, 0).at(79) == order.at(79), "a new object, at a late step"


def test_the_loss_is_that_of_the_head_of_the_task() -> None:
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([0, 1, 0, 1, 0, 1, 2, 3, 4, 2])
    head = nn.Linear(4, 5)
    selected: list[str] = []

    def inputs(samples: object) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([image for _, image in samples])  # type: ignore[attr-defined]
        return features[rows], truth[rows]

    schedule = TaskSchedule([0.5, 0.5], seed=1)
    order = TaskOrder(TASKS, range(10), schedule, 3, seed=1)
    weights = torch.tensor([0.5, 1.0, 2.0])
    plain = ClassifyingLoss(head, inputs, Order(range(10), 0), 3, smoothing=0.1)
    loss = TaskLoss(plain, TASKS, schedule, order, [None, weights], lambda task: selected.append(task.name))
    for step in range(6):
        task = TASKS[schedule.task(step)]
        images = [order.at(3 * step + row)[1] for row in (0, 2)]
        logits = (features[images] @ head.weight.T + head.bias)[:, task.start : task.start + len(task.classes)]
        labels = truth[images] - task.start
        if task.name == "cats":
            expected = cross_entropy(logits, labels, label_smoothing=0.1)
        else:
            expected = cross_entropy(logits, labels, weights, label_smoothing=0.1, reduction="none").mean()
        torch.testing.assert_close(loss(step, [0, 2]), expected)
        assert selected[-1] == task.name
    assert {*selected} == {"cats", "dogs"}


def test_names_of_tasks() -> None:
    assert task_sources(["photos/pets", "b=photos/pets", "digits"]) == {
        "pets": "photos/pets",
        "b": "photos/pets",
        "digits": "digits",
    }
    with raises(OptionError, option="tasks", given=("photos",)):
        task_sources(["photos"])
    with raises(OptionError, option="more_data", given="pets"):
        task_sources(["photos/pets", "other/pets"])
    assert rows_of([task.as_dict() for task in TASKS], 1) == slice(2, 5) == TASKS[1].rows
    for data, given in (["..=digits", "photos"], ".."), (["photos", "/"], ""):
        with raises(OptionError, option="more_data", given=given):
            task_sources(data)
    assert set(task_sources([".", "photos"])) == {Path.cwd().name, "photos"}
