"""A task of a run with several data sets: its name, its data, and its rows of the common head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.injection import OptionError


@dataclass(frozen=True)
class Task:
    """One task of a run.

    Args:
        name: its name. `classes`: names of its classes.
        start: its first class among the classes of all tasks, which is the first row of its head.
        images: (start, stop) of its images among the images of all tasks.
        mirror: whether a mirrored image still belongs to its class; see `Source.mirror`.
    """

    name: str
    classes: tuple[str, ...]
    start: int
    images: tuple[int, int]
    mirror: bool = True

    @property
    def rows(self) -> slice:
        """Its rows of the common head, and its columns of the logits."""
        return slice(self.start, self.start + len(self.classes))

    def indices(self, images: Sequence[int]) -> tuple[int, ...]:
        """Those of some images that belong to it."""
        return tuple(index for index in images if self.images[0] <= index < self.images[1])

    def as_dict(self) -> dict[str, Any]:
        """Entry of `model.json`."""
        return {"name": self.name, "classes": list(self.classes)}


def rows_of(tasks: Sequence[Mapping[str, Any]], index: int) -> slice:
    """Rows of a task's head from the entries of `model.json`."""
    sizes = [len(task["classes"]) for task in tasks]
    return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


def task_sources(data: Sequence[str]) -> dict[str, str]:
    """Name to data of each task, from `DATA` or `NAME=DATA`; by default the name of the folder or file.

    Raises:
        OptionError: fewer than two tasks, two with one name, or a name that is empty or of dots only.
    """
    pairs = [_split(entry) for entry in data]
    if len(pairs) < 2:
        message = f"tasks with data of {len(pairs)} task; expected at least two: veneer transfer DATA1 DATA2 … --tasks."
        raise OptionError(message, option="tasks", given=tuple(data), expected="at least two tasks")
    bad = next((name for name, _ in pairs if not name.strip(".")), None)
    if bad is not None:
        message = f"a task is named {bad!r}; expected the name of a folder. Name it: NAME=DATA."
        raise OptionError(message, option="more_data", given=bad, expected="the name of a folder")
    again = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if again:
        message = f"two tasks are named {again[0]!r}; expected different names. Name them: NAME=DATA."
        raise OptionError(message, option="more_data", given=again[0], expected="different names")
    return dict(pairs)


def _split(entry: str) -> tuple[str, str]:
    match = re.fullmatch(r"([\w.-]+)=(.+)", entry)
    if match and not Path(entry).exists():
        return match.group(1), match.group(2)
    path = Path(entry) if Path(entry).name not in ("", "..") else Path(entry).resolve()
    return path.stem if path.is_file() else path.name, entry
