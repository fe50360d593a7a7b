"""Checks of the options of a run with several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.injection import OptionError
from veneer.injection.method import Method


def check_task_options(
    tasks: bool, more_data: Sequence[str], methods: Sequence[type[Method]], class_names: bool, others: Mapping[str, Any]
) -> None:
    """Rejects options that do not go together with several tasks, or that need them.

    Args:
        methods: classes of the methods. `class_names`: the head of the model are embeddings of class names, or is kept.
        others: option to value, of options that must be disabled.
    Raises:
        OptionError: with the option.
    """
    if not tasks:
        if more_data:
            message = f"data of several tasks ({', '.join(more_data)} too) without --tasks; add --tasks, or pass one data set."
            raise OptionError(message, option="more_data", given=tuple(more_data), expected=())
        for method in methods:
            if method.needs_tasks:
                message = (
                    f"{method.name} needs several tasks; expected veneer transfer DATA1 DATA2 … --tasks --method {method.name}."
                )
                raise OptionError(message, option="method", method=method.name, given=method.name, expected="tasks")
        return
    if class_names:
        message = "tasks need a new head for each task; expected a model and methods without class embeddings and --head kept."
        raise OptionError(message, option="model", given="class embeddings", expected="fresh")
    for name, value in others.items():
        if value:
            message = f"{name} is {value!r}, which runs with several tasks do not support; leave it out."
            raise OptionError(message, option=name, given=value, expected=None)
    for method in methods:
        if method.prepares:
            message = f"{method.name} has a pass over the labels of one task; choose another method for several tasks."
            raise OptionError(message, option="method", method=method.name, given=method.name, expected="no pass over the data")
