"""Progress of a run: one event per step, shown on a terminal or in a log, and written to a file."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

from .bars import show_bar

WINDOW = 50
"""Number of steps over which the smoothed loss and the remaining time are averaged."""


@dataclass(frozen=True)
class Progress:
    """The state of a run after a step.

    Args:
        step, steps: finished steps, and steps of the run.
        loss: mean loss of this step, over all processes.
        smoothed: mean loss of the last 50 steps.
        learning_rate: learning rate of the first parameter group.
        gradient_norm: L2 norm of the whole gradient before clipping; infinite in a step skipped by fp16.
        seconds: training time so far, including that before resuming.
        seconds_left: estimate from the last 50 steps of this process; None after the first step.
        memory_bytes: peak memory of this process, on its device.
    """

    step: int
    steps: int
    loss: float
    smoothed: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    seconds_left: float | None
    memory_bytes: int

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f"  {clock(self.seconds_left)} left"
        return f"step {self.step}/{self.steps}  {self.note(left)}"

    def note(self, left: str = "") -> str:
        """Loss, learning rate, `left` and memory."""
        return f"loss {self.smoothed:.4f}  lr {self.learning_rate:.2e}{left}  {self.memory_bytes / 2**30:.1f} GiB"


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """Prints progress: a bar on a terminal, else a new line per interval.

    Args:
        stream: output stream (default: standard error).
        seconds: minimum time between two lines in a log (terminals: 0.1 s). The first and last step are always printed.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.seconds = 0.1 if self.terminal else seconds
        self._shown: float | None = None

    def __call__(self, progress: Progress) -> None:
        now, last = time.monotonic(), progress.step == progress.steps
        if self._shown is not None and now - self._shown < self.seconds and not last:
            return
        self._shown = now
        if self.terminal:
            show_bar(self.stream, "training", progress.step, progress.steps, "steps", progress.note())
        else:
            self.stream.write(f"{progress}\n")
            self.stream.flush()


class ProgressFile:
    """Writes progress as JSON lines to a file, for monitoring; a resumed run appends to it.

    Every line has `phase`, `done` and `total` (see `phases`); a line of a step has the fields of `Progress` as well.

    Args:
        path: `progress.jsonl` in the run's folder. `seconds`: minimum time between two lines; the first and last step are always
            written.
    """

    def __init__(self, path: Path, seconds: float = 1.0) -> None:
        self.path, self.seconds = path, seconds
        self._written_at: float | None = None

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._written_at is not None and now - self._written_at < self.seconds and progress.step < progress.steps:
            return
        start = "\n" if self._written_at is None and self.path.exists() else ""  # keeps a line that was cut by a kill separate
        self._written_at = now
        with contextlib.suppress(OSError):  # a full disk does not end a run
            self._append(start, progress)

    def _append(self, start: str, progress: Progress) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            phase = {"phase": "training", "done": progress.step, "total": progress.steps}
            file.write(f"{start}{json.dumps({**phase, **asdict(progress)})}\n")


def read_progress(path: Path) -> list[Progress]:
    """Reads the events of a `ProgressFile`, sorted by step; for steps repeated after a resume, the latest. Incomplete lines and a
    missing file are ignored."""
    events: list[Progress] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            event = Progress(**{key: value for key, value in record.items() if key not in ("phase", "done", "total")})
        except (ValueError, TypeError, AttributeError):
            continue
        while events and events[-1].step >= event.step:
            events.pop()
        events.append(event)
    return events


class Pace:
    """Estimates the remaining time from the last `WINDOW` steps; `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)

    def left(self, steps: int) -> float | None:
        """Records the end of a step; returns the estimated seconds of `steps` more steps, or None after the first step."""
        self._ends.append(self._clock())
        if len(self._ends) < 2:
            return None
        return steps * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def reset_peak_memory(device: torch.device) -> None:
    """Resets the peak of `peak_memory`, if the device supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated memory on CUDA, driver memory on MPS, resident memory of the process on a CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
