"""The images of each task as folders of `SPLIT/CLASS/IMAGE`, with few images of each class."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from veneer.classification.data.labeled_images import Source
from veneer.classification.data.sources import open_source
from veneer.classification.data.splits import split

from .icons import STYLES, render_icons

RENDERED = 140
"""Rendered images of each class, before the split."""


@dataclass(frozen=True)
class Counts:
    """Images of each class.

    Args:
        train: training images of a task with many. `shots`: training images of a task with few, a subset of them.
        validation, test: largest number of validation and test images, the same for all seeds.
    """

    train: int = 40
    shots: int = 4
    validation: int = 8
    test: int = 20


class TaskImages:
    """Folders of the images of all tasks, written when they are first needed.

    Args:
        work: folder of the benchmark. `clothes`: data of the first task, as for `veneer transfer`.
    """

    def __init__(self, work: Path, clothes: str, counts: Counts) -> None:
        self.folder, self.clothes, self.counts = work / "images", clothes, counts
        self._data = {"clothes": clothes, "digits": "digits", **dict.fromkeys(STYLES, "")}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self._data)

    def many(self, task: str, seed: int) -> Path:
        """Folder of a task with many training images, which the seed selects."""
        return self._write(task, "shape", seed, self.counts.train)

    def few(self, task: str, seed: int) -> Path:
        """Folder of a task with few training images, of those in `many`."""
        return self._write(task, "shape", seed, self.counts.shots)

    def places(self, style: str, seed: int) -> Path:
        """Folder of icons of a style whose classes are the places: images of the style without the names of their shapes."""
        return self._write(style, "place", seed, self.counts.train)

    def _write(self, task: str, label: str, seed: int, train: int) -> Path:
        name = f"{task}-places" if label == "place" else task
        target = self.folder / f"{name}-{train}-{seed}"
        if not target.is_dir():
            data = self._data[task] or str(self._render(name, task, label))
            counts = {"train": train, "validation": self.counts.validation, "test": self.counts.test}
            write_splits(open_source(data), target, counts, seed)
        return target

    def _render(self, name: str, style: str, label: str) -> Path:
        folder = self.folder / f"{name}-all"
        if not folder.is_dir():
            part = _empty(folder)
            render_icons(part, style, RENDERED, "place" if label == "place" else "shape", STYLES.index(style))
            part.rename(folder)
        return folder


def write_splits(source: Source, folder: Path, counts: dict[str, int], seed: int) -> Path:
    """Writes images as `SPLIT/CLASS/IMAGE`.

    Args:
        counts: split to its largest number of images of each class; fewer are the first ones of more.
        seed: selects the training images; validation and test images are the same for all seeds.
    """
    splits, part = split(source, 0), _empty(folder)
    for name, count in counts.items():
        indices = getattr(splits, name)
        for label, title in enumerate(source.classes):
            of_class = [index for index in indices if source.examples[index].label == label]
            chosen = np.random.default_rng((seed if name == "train" else 0, label)).permutation(len(of_class))[:count]
            _copy(source, [of_class[i] for i in chosen], part / name / title)
    part.rename(folder)
    return folder


def _copy(source: Source, indices: Sequence[int], folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in indices:
        example = source.examples[index]
        suffix = Path(example.name).suffix or ".png"
        (folder / f"{index:05d}{suffix}").write_bytes(source.content(example))


def _empty(folder: Path) -> Path:
    """An empty folder beside another, which it becomes when it is complete."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part
