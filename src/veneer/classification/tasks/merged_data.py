"""The images of all tasks as one source, whose classes are those of each task in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TransferConfig
from ..data.image_checks import check_images
from ..data.labeled_images import Example, Source
from ..data.run_data import Data, require_images, split_options
from ..data.sources import open_source
from ..data.split_files import check_options, load_splits, save_splits
from ..data.splits import Splits, digest_of, hashes_of, split
from .task import Task


def open_task_data(config: TransferConfig, out: Path, progress: Callable[[int, int], None] | None = None) -> Data:
    """Reads, checks and splits the images of each task. All splits are in `out/splits.json`; a resumed run reuses them.

    Images that cannot be read are listed in `out/tasks/NAME/skipped.txt`.

    Raises:
        DataError: as `open_data`, for one of the tasks.
    """
    sources, notes = dict[str, Source](), list[str]()
    for name, data in config.task_sources().items():
        folder, threads = out / "tasks" / name, config.workers or None
        checked = check_images(open_source(data), folder=folder, threads=threads, progress=progress)
        sources[name] = checked.source
        notes += [f"{name}: {note}" for note in checked.notes]
    source, tasks = merge(sources)
    file, options = out / "splits.json", split_options(config)
    if config.resume and file.is_file():
        check_options(file, options)
        splits = load_splits(file, source)
    else:
        splits = split_each(sources, source, tasks, config)
        save_splits(splits, source, file, options)
    for task in tasks:
        parts = {name: task.indices(getattr(splits, name)) for name in ("train", "validation", "test")}
        require_images(sources[task.name].where, parts)
    return Data(source, splits, (*notes, *splits.notes), tasks)


@dataclass(frozen=True)
class MergedContent:
    """Reads the bytes of an image of any task; see `Source.content`. `sources`: by the name of the task."""

    sources: Mapping[str, Source]

    def __call__(self, example: Example) -> bytes:
        """The bytes of an image with the name `TASK/NAME`."""
        task, _, name = example.name.partition("/")
        return self.sources[task].content(dataclasses.replace(example, name=name))


def merge(sources: Mapping[str, Source]) -> tuple[Source, tuple[Task, ...]]:
    """One source with the images `TASK/NAME` and the classes `TASK/CLASS` of all tasks, and the tasks."""
    classes, examples, hashes, tasks = list[str](), list[Example](), dict[str, str](), list[Task]()
    for name, source in sources.items():
        first, images = len(classes), len(examples)
        tasks.append(Task(name, source.classes, first, (images, images + len(source)), source.mirror))
        classes += [f"{name}/{each}" for each in source.classes]
        examples += [dataclasses.replace(each, name=f"{name}/{each.name}", label=first + each.label) for each in source.examples]
        hashes |= {f"{name}/{each}": value for each, value in source.hashes.items()}
    where = ", ".join(f"{name} ({source.where})" for name, source in sources.items())
    return Source(where, tuple(classes), tuple(examples), MergedContent(dict(sources)), hashes=hashes), tuple(tasks)


def split_each(sources: Mapping[str, Source], merged: Source, tasks: Sequence[Task], config: TransferConfig) -> Splits:
    """The splits of each task alone, as indices in the merged source."""
    options: dict[str, Any] = {"validation": config.validation, "test": config.test, "shots": config.shots}
    splits = [split(sources[task.name], config.split_seed, **options) for task in tasks]

    def joined(name: str) -> tuple[int, ...]:
        parts = zip(tasks, splits, strict=True)
        return tuple(task.images[0] + index for task, each in parts for index in getattr(each, name))

    indices = joined("train"), joined("validation"), joined("test")
    made = tuple(dict.fromkeys(name for each in splits for name in each.made))
    notes = tuple(f"{task.name}: {note}" for task, each in zip(tasks, splits, strict=True) for note in each.notes)
    digest = digest_of(merged, hashes_of(merged), indices)
    return Splits(*indices, config.split_seed, config.shots, made, notes, digest)
