"""The part of `Attachment` that selects a task, for methods that compute another function for each task."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence

from ..errors import StateError, UnknownName
from ..method import Adapter, Method
from ..sites import Site


def task_index(name: str, tasks: Sequence[str], where: str) -> int:
    """Index of a task.

    Args:
        where: attachment or folder with the tasks, for the message.
    Raises:
        UnknownName: there is no such task; `close` has the names spelled most like it.
    """
    if name in tasks:
        return tasks.index(name)
    close = difflib.get_close_matches(name, tasks, 1, cutoff=0.5)
    near = f" Did you mean {close[0]!r}?" if close else ""
    message = f"{where}: no task {name!r}; expected one of {', '.join(tasks)}.{near}"
    raise UnknownName(message, name, "task", close, where=where, given=name, expected=tuple(tasks))


class CurrentTask:
    """Base class of `Attachment`: its tasks, and the one of the following forward passes."""

    name: str
    method: Method
    parts: dict[str, tuple[Site, Adapter]]
    merged: bool
    _task: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the method distinguishes; empty for a method that shares its parameters among all tasks."""
        return self.method.task_names

    @property
    def task(self) -> str | None:
        """The task of the following forward passes; None while none of several is selected, and for methods without tasks.

        Setting it writes a buffer, without recompilation. It has no effect on a method without tasks.

        Raises:
            UnknownName: the method has no such task.
        """
        return self.tasks[0] if len(self.tasks) == 1 else self._task

    @task.setter
    def task(self, name: str | None) -> None:
        if self.tasks and name is not None:
            self.method.select_task(list(self.parts.values()), task_index(name, self.tasks, f"'{self.name}'"))
        self._task = name if self.tasks else None

    def materialize(self, task: str) -> None:
        """Replaces generated parameters by those of one task, so that the file has an ordinary adapter without the generator.

        The outputs for this task do not change. `method` becomes the new config, and the parameters are new ones, so an
        optimizer or a checkpoint must not be used afterwards.

        Raises:
            UnknownName: the method has no such task. StateError: it has no tasks, or is merged.
        """
        if self.merged:
            message = f"'{self.name}' is merged. Call unmerge() before materialize()."
            raise StateError(message, where=self.name, given="merged", expected="unmerged")
        if not self.tasks:
            message = f"'{self.name}': {self.method.name} has no tasks, so that all of its parameters are already ordinary ones."
            raise StateError(message, where=self.name, given=self.method.name, expected="needs_tasks")
        index = task_index(task, self.tasks, f"'{self.name}'")
        self.method = self.method.materialize(list(self.parts.values()), index)

    def require_task(self) -> None:
        """Raises in a forward pass of a method with several tasks while none is selected.

        Raises:
            StateError: no task is selected; `expected` has their names.
        """
        if self.tasks and self.task is None:
            message = (
                f"'{self.name}' ({self.method.name}) has {len(self.tasks)} tasks and none is selected. Set attachment.task to "
                f"one of {', '.join(self.tasks)} before the forward pass."
            )
            raise StateError(message, where=self.name, given=None, expected=self.tasks)


@contextlib.contextmanager
def example_task(attachment: CurrentTask) -> Iterator[None]:
    """Selects the first task inside a `with` block if none is selected, for probes, which need no particular one."""
    before = attachment.task
    if attachment.tasks and before is None:
        attachment.task = attachment.tasks[0]
    try:
        yield
    finally:
        attachment.task = before
