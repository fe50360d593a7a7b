"""What a run tells while it runs: one event a step, and a line that shows it on a terminal or in a log."""

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

WINDOW = 50
"""Steps that the smoothed loss and the time left are averaged over."""


@dataclass(frozen=True)
class Progress:
    """The state of a run after a step.

    Args:
        step, steps: steps done, and steps in the whole run.
        loss: mean loss of this step, over all processes.
        smoothed: mean loss of the last 50 steps.
        learning_rate: of the first parameter group, in this step.
        gradient_norm: L2 norm of the whole gradient before clipping; infinite in a step that fp16 had to skip.
        seconds: training time so far, resumed parts included.
        seconds_left: estimate from the last 50 steps of this process; None after the first.
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
        return (
            f"step {self.step}/{self.steps}  loss {self.smoothed:.4f}  lr {self.learning_rate:.2e}"
            f"{left}  {self.memory_bytes / 2**30:.1f} GiB"
        )


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """Shows events: one line that rewrites itself on a terminal, else a line of its own now and then.

    Args:
        stream: where to write; standard error if none is given.
        seconds: at least so long between two lines in a log (terminals: 0.1 s). The first and last step are always shown.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.seconds = 0.1 if self.terminal else seconds
        self._shown: float | None = None
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        now, last = time.monotonic(), progress.step == progress.steps
        if self._shown is not None and now - self._shown < self.seconds and not last:
            return
        self._shown = now
        text = str(progress)
        if self.terminal:
            self.stream.write(f"\r{text.ljust(self._width)}" + ("\n" if last else ""))
            self._width = len(text)
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()


class ProgressFile:
    """Events as lines of JSON in a file, for whoever looks at a run from outside; a resumed run goes on in it.

    Every line has `phase`, `done` and `total` (see `phases`); a line of a step has the fields of `Progress` as well.

    Args:
        path: usually `progress.jsonl` in the run's folder. `seconds`: at least so long between two lines; the first and the last
            step are always told.
    """

    def __init__(self, path: Path, seconds: float = 1.0) -> None:
        self.path, self.seconds = path, seconds
        self._told: float | None = None

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._told is not None and now - self._told < self.seconds and progress.step < progress.steps:
            return
        start = "\n" if self._told is None and self.path.exists() else ""  # what a kill has cut stays a line of its own
        self._told = now
        with contextlib.suppress(OSError):  # a disk without space is no reason to end a run
            self._append(start, progress)

    def _append(self, start: str, progress: Progress) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            phase = {"phase": "training", "done": progress.step, "total": progress.steps}
            file.write(f"{start}{json.dumps({**phase, **asdict(progress)})}\n")


def read_progress(path: Path) -> list[Progress]:
    """What `ProgressFile` has told, by rising step: of steps that were done again after a resume, the later ones. Cut lines and
    files that are not there are passed over."""
    found: list[Progress] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            told = json.loads(line)
            event = Progress(**{key: value for key, value in told.items() if key not in ("phase", "done", "total")})
        except (ValueError, TypeError, AttributeError):
            continue
        while found and found[-1].step >= event.step:
            found.pop()
        found.append(event)
    return found


class Pace:
    """Estimates the time left from the last `WINDOW` steps; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)

    def left(self, steps: int) -> float | None:
        """Note the end of a step, and give the seconds that `steps` more will take; None after the first step."""
        self._ends.append(self._clock())
        if len(self._ends) < 2:
            return None
        return steps * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak of `peak_memory` anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a CUDA device, driver memory on MPS, resident memory of the process on a CPU (0 if unknown)."""
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
