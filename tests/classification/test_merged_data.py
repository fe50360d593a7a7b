"""The images of several tasks as one source: names, labels, bytes, splits and mirroring of each task."""

from __future__ import annotations

import dataclasses
import io

import torch
from PIL import Image

from veneer.classification.config import TransferConfig
from veneer.classification.data.labeled_images import LabeledRow, Source, assemble
from veneer.classification.data.run_data import Data
from veneer.classification.data.splits import split
from veneer.classification.data.transforms import TrainView
from veneer.classification.tasks.merged_data import merge, split_each

ENTRY = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}


def source(name: str, classes: str, count: int, *, mirror: bool = True, split_of_last: bool = False) -> Source:
    files = {}
    for number in range(count * len(classes)):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (number, len(name), 0)).save(stream, "PNG")
        files[f"{number:02d}"] = stream.getvalue()
    rows = [
        LabeledRow(
            n, classes[int(n) % len(classes)], ("test" if int(n) >= len(files) - 2 else "train") if split_of_last else None
        )
        for n in files
    ]
    return dataclasses.replace(assemble(name, rows, lambda example: files[example.name]), mirror=mirror)


SOURCES = {"letters": source("letters", "ab", 6), "marks": source("marks", "abc", 4, mirror=False, split_of_last=True)}


def test_images_and_classes_of_the_tasks_follow_one_another() -> None:
    merged, tasks = merge(SOURCES)
    assert merged.classes == ("letters/a", "letters/b", "marks/a", "marks/b", "marks/c")
    assert [(task.start, task.images) for task in tasks] == [(0, (0, 12)), (2, (12, 24))]
    for task in tasks:
        own = SOURCES[task.name]
        for index, example in enumerate(own.examples):
            other = merged.examples[task.images[0] + index]
            assert other.name == f"{task.name}/{example.name}"
            assert merged.classes[other.label] == f"{task.name}/{own.classes[example.label]}"
            assert merged.content(other) == own.content(example)


def test_splits_are_those_of_each_task_alone() -> None:
    """Also of a task with a test split beside one without."""
    merged, tasks = merge(SOURCES)
    config = TransferConfig(validation=0.2, test=0.25, split_seed=3)
    splits = split_each(SOURCES, merged, tasks, config)
    for task in tasks:
        alone = split(SOURCES[task.name], 3, validation=0.2, test=0.25)
        for name in ("train", "validation", "test"):
            indices = [index - task.images[0] for index in task.indices(getattr(splits, name))]
            assert indices == list(getattr(alone, name))
    assert [index - 12 for index in tasks[1].indices(splits.test)] == [10, 11]


def test_only_images_of_tasks_that_allow_it_are_mirrored() -> None:
    merged, tasks = merge(SOURCES)
    splits = split_each(SOURCES, merged, tasks, TransferConfig())
    data = Data(merged, splits, (), tasks)
    assert [data.mirror(index) for index in (0, 11, 12, 23)] == [True, True, False, False]
    assert Data(SOURCES["marks"], splits, ()).mirror(0) is False
    image = Image.radial_gradient("L").convert("RGB").crop((0, 0, 100, 256)).resize((8, 8))
    mixed, always, never = (TrainView(ENTRY, "flip", 0, mirror=mirror) for mirror in (data.mirror, True, False))
    for index in range(24):
        expected = always if index < 12 else never
        assert torch.equal(mixed(image, 0, index), expected(image, 0, index))
    assert any(not torch.equal(always(image, 0, index), never(image, 0, index)) for index in range(12, 24))
