"""A job in words and figures: what a page says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.training.progress import Progress, clock

from ..jobs import Job
from ..studio import Studio, escaped
from ..workspace import shown

POINTS = 300
"""Points of a loss curve at most."""
STATES = {"waiting": "waits", "running": "runs", "stopped": "stopped", "done": "done", "failed": "failed"}


def listed(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Choices of a list: what people read, and the job's name."""
    return [(f"{shown(job.title)} · {job.when} · {STATES[job.state]}", job.name) for job in jobs]


def told(studio: Studio, job: Job, steps: Sequence[Progress]) -> str:
    """Where a job stands, in Markdown, with the place in the queue."""
    state, last = job.state, steps[-1] if steps else None
    words = {
        "waiting": lambda: _waits(studio, job),
        "running": lambda: _runs(job, last),
        "stopped": lambda: _stopped(job, last),
        "done": lambda: f"is done{_took(last)}.",
        "failed": lambda: f"failed{_reached(last)}. {escaped(job.why())}",
    }[state]()
    return f"**{escaped(shown(job.title))}** {words}"


def _waits(studio: Studio, job: Job) -> str:
    ahead = studio.queue.place(job) + sum(other.state == "running" for other in studio.queue.jobs())
    again = " It was interrupted, and goes on from its last checkpoint." if job.begun else ""
    if ahead == 0:
        return f"begins in a moment.{again}"
    return f"waits for its turn: {ahead} {'job is' if ahead == 1 else 'jobs are'} ahead of it.{again}"


def _runs(job: Job, last: Progress | None) -> str:
    if (job.folder / "stop").exists():
        return "ends after this step, and keeps what it has learnt."
    if last is None:
        return "gets ready: it loads the base and looks at what it is given."
    if last.step >= last.steps:
        return "has learnt all it should, and now draws and measures what came of it."
    left = "" if last.seconds_left is None else f", about {clock(last.seconds_left)} left"
    return f"learns: step {last.step} of {last.steps}{left}."


def _stopped(job: Job, last: Progress | None) -> str:
    kept = "What it had learnt by then is kept" if (job.run / "adapter.safetensors").exists() else "Nothing is lost"
    return f"was stopped{_reached(last)}. {kept}; it can go on."


def _reached(last: Progress | None) -> str:
    return f" after step {last.step} of {last.steps}" if last else " before its first step"


def _took(last: Progress | None) -> str:
    return f": {last.steps} steps in {clock(last.seconds)}" if last else ""


def bar(steps: Sequence[Progress]) -> str:
    """A progress bar that a screen reader reads; only numbers go into it."""
    if not steps:
        return ""
    last = steps[-1]
    left = "" if last.seconds_left is None or last.step >= last.steps else f", {clock(last.seconds_left)} left"
    words = f"{last.step} of {last.steps} steps{left}"
    style = "width:100%;height:1.2em"
    return f'<progress style="{style}" max="{last.steps}" value="{last.step}" aria-label="{words}">{words}</progress>'


def curve(steps: Sequence[Progress]) -> Any:
    """A table of the mean loss of the last steps by step, of at most `POINTS` rows; None while there are no two."""
    import pandas as pd

    if len(steps) < 2:
        return None
    every = max(1, -(-len(steps) // POINTS))
    kept = [*steps[:-1:every], steps[-1]]
    return pd.DataFrame({"step": [s.step for s in kept], "loss": [s.smoothed for s in kept]})
