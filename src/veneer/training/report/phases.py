"""Phases of a run: lines in `progress.jsonl` and on the terminal, and the time of each phase.

report = PhaseReport(out / "progress.jsonl", sys.stderr)
report("loading")
count = report("evaluating", 42)      # {"phase": "evaluating", "done": 0, "total": 42, "seconds_left": null}
count(4)                              # {"phase": "evaluating", "done": 4, "total": 42, "seconds_left": 19.0}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from .bars import close_bar, show_bar
from .progress import clock

PHASES: Mapping[str, str] = {
    "loading": "loading the model",
    "class_images": "generating with the base model",
    "caching": "encoding photos and captions",
    "training": "training",
    "previews": "generating previews",
    "generating": "generating",
    "comparing": "generating with and without the adapters",
    "evaluating": "evaluating",
    "saving": "saving",
}
"""Phase to its label on the terminal."""


@dataclass(frozen=True)
class Phase:
    """Current phase of a run.

    Args:
        phase: a key of `PHASES`.
        done, total: images, or training steps; both 0 without a count.
        seconds_left: remaining seconds of this phase, or None if unknown.
    """

    phase: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None

    def __str__(self) -> str:
        words = PHASES.get(self.phase, self.phase)
        left = "" if self.seconds_left is None or self.done == self.total else f", {clock(self.seconds_left)} left"
        return f"{words}: {self.done}/{self.total} images{left}" if self.total else f"{words} …"


class PhaseReport:
    """Reports the phase of a run.

    Args:
        path: `progress.jsonl` of the run, or None. `stream`: stream for readable lines, or None.
        seconds: minimum time between two lines of one phase, 0.1 on a terminal; its first and last are always written.

    Attributes:
        seconds_in: seconds spent in each phase so far.
    """

    def __init__(
        self,
        path: Path | None = None,
        stream: TextIO | None = None,
        seconds: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.stream, self.now = path, stream, now
        self.seconds = min(seconds, 0.1) if stream is not None and stream.isatty() else seconds
        self.seconds_in: dict[str, float] = {}
        self._phase, self._since = "", now()
        self._begun = self._since

    def __call__(self, phase: str, total: int = 0, done: int = 0) -> PhaseCounter:
        """Starts a phase; call the returned counter after each part, such as a batch of images."""
        self.close()
        self._phase, self._since = phase, self.now()
        return PhaseCounter(self, phase, total, done)

    @property
    def elapsed(self) -> float:
        """Seconds since the start of the run."""
        return self.now() - self._begun

    def close(self) -> None:
        """Ends the current phase."""
        close_bar()
        if self._phase:
            spent = self.now() - self._since
            self.seconds_in[self._phase] = self.seconds_in.get(self._phase, 0.0) + spent
        self._phase = ""

    def write(self, phase: Phase) -> None:
        """Writes one line to the file and one to the stream; a full disk does not end a run."""
        if self.stream is not None:
            self._show(phase, self.stream)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{json.dumps(asdict(phase))}\n")
        except OSError:
            return

    def _show(self, phase: Phase, stream: TextIO) -> None:
        """A bar on a terminal, a line elsewhere and for a phase without a count."""
        if phase.total and stream.isatty():
            show_bar(stream, PHASES.get(phase.phase, phase.phase), phase.done, phase.total)
        else:
            close_bar()
            stream.write(f"{phase}\n")
            stream.flush()


def report_of_run(out: Path, is_main: bool, dry_run: bool) -> PhaseReport:
    """The report of a run: lines on stderr and, unless it is a dry run, in `progress.jsonl`; nothing outside the main process."""
    return PhaseReport(None if dry_run else out / "progress.jsonl", sys.stderr) if is_main else PhaseReport()


class PhaseCounter:
    """Counts the parts of one phase."""

    def __init__(self, report: PhaseReport, phase: str, total: int, done: int = 0) -> None:
        self.report, self.phase, self.total, self.done = report, phase, total, done
        self._first, self._start = done, report.now()
        self._shown = self._start
        report.write(Phase(phase, done, total))

    def reach(self, done: int, total: int) -> None:
        """Sets the number of finished parts and of all parts."""
        self.total = total
        self(done - self.done)

    def __call__(self, count: int = 1) -> None:
        """Adds finished parts."""
        self.done += count
        now, last = self.report.now(), self.done == self.total
        if now - self._shown < self.report.seconds and not last:
            return
        self._shown = now
        finished = self.done - self._first
        left = (self.total - self.done) * (now - self._start) / finished if finished else None
        self.report.write(Phase(self.phase, self.done, self.total, left))


def read_phase(path: Path) -> Phase | None:
    """The phase in the last complete line of `progress.jsonl`; a training step has phase `training`. None without lines."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            found = json.loads(line)
            if "phase" in found:
                return Phase(str(found["phase"]), int(found["done"]), int(found["total"]), found.get("seconds_left"))
            return Phase("training", int(found["step"]), int(found["steps"]), found.get("seconds_left"))
        except (ValueError, TypeError, KeyError):
            continue
    return None
