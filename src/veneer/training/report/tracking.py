"""Logging to TensorBoard or any other tracker of accelerate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration

from ..loop.errors import TrainError

_log = logging.getLogger(__name__)

Record = Callable[[Mapping[str, float], int], None]

_open_trackers: list[Record] = []


def select_trackers(names: str) -> list[str]:
    """The installed ones of the requested trackers; logs a warning for each missing package.

    Args:
        names: comma-separated names; `none` or empty for no tracker.

    Raises:
        TrainError: a tracker that accelerate does not support.
    """
    requested = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    known, installed = set(LOGGER_TYPE_TO_CLASS), {str(tracker) for tracker in get_available_trackers()}
    unknown = sorted(set(requested) - known)
    if unknown:
        message = f"tracker {unknown[0]!r} is unknown; expected none, or any of {', '.join(sorted(known))}"
        raise TrainError(message, where="tracker", given=unknown[0], expected=tuple(sorted(known)))
    for name in requested:
        if name not in installed:
            _log.warning("tracker %s is disabled: its package is not installed", name)
    return [name for name in requested if name in installed]


@contextmanager
def tracking(names: str, folder: Path | None, settings: Mapping[str, Any], step: int = 0) -> Iterator[Record]:
    """Opens the trackers of a run; yields `record(values, step)`, which has no effect without trackers.

    Args:
        names: as in `select_trackers`.
        folder: file-based trackers write to `folder/logs`; None disables tracking.
        settings: the run's settings, recorded once.
        step: finished steps on resume: TensorBoard discards records of later steps.
    """
    chosen = select_trackers(names) if folder is not None else []
    if not chosen or folder is None:
        yield lambda values, step: None
        return
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs"))
    accelerator = Accelerator(log_with=chosen, project_config=project)  # shares the process state of the run's own
    plain = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in settings.items()}
    options = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers("veneer", config=None if step else plain, init_kwargs=options)

    def record(values: Mapping[str, float], step: int) -> None:
        accelerator.log(dict(values), step=step)

    _open_trackers.append(record)
    try:
        yield record
    finally:
        _open_trackers.remove(record)
        for tracker in accelerator.trackers:
            tracker.finish()


def record_scores(values: Mapping[str, float], step: int) -> None:
    """Records scores besides those of the training loop in the open trackers; without one, it has no effect.

    Args:
        step: finished steps.
    """
    for record in _open_trackers:
        record(values, step)
