"""A job in words and figures: what a page says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.training.report.phases import Phase
from veneer.training.report.progress import Progress, clock

from ...context import Studio, escaped
from ...jobs import Job
from ...workspace import shown
from .verdict import failed, read_result

POINTS = 300
"""Points of a loss curve at most."""
PHASES = {
    "loading": "loads the base model", "class_images": "generates images to train on, with the base model",
    "previews": "generates previews", "evaluating": "evaluates: it generates images and compares them",
    "saving": "saves its files",
}  # fmt: skip
"""What a run tells of itself between its steps, in words."""
STATES = {"waiting": "waits", "running": "runs", "stopped": "stopped", "done": "done", "failed": "failed"}


def listed(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Choices of a list: what people read, and the job's name."""
    return [(f"{shown(job.title)} · {job.when} · {_ended(job) or STATES[job.state]}", job.name) for job in jobs]


def _ended(job: Job) -> str:
    """What a job that came to its end did not do, such as `not learned`."""
    return failed(read_result(job)) if job.state == "done" else ""


def told(studio: Studio, job: Job, steps: Sequence[Progress]) -> str:
    """Where a job stands, in Markdown, with the place in the queue."""
    state, last = job.state, steps[-1] if steps else None
    words = {
        "waiting": lambda: _waits(studio, job),
        "running": lambda: _runs(job, last),
        "stopped": lambda: _stopped(job, last),
        "done": lambda: f"has ended, **{_ended(job)}**{_took(last)}." if _ended(job) else f"is done{_took(last)}.",
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
        return "ends after this step, and saves what it has trained."
    phase = job.phase()
    if phase is not None:
        what = PHASES.get(phase.phase, f"is in the phase {escaped(shown(phase.phase))}")
        return f"{what}: {_counted(phase)}." if phase.total else f"{what}."
    if last is None:
        return "gets ready: it loads the base model and its data."
    if last.step >= last.steps:
        return "has done all its steps, and now generates and evaluates: the longest part after training."
    left = "" if last.seconds_left is None else f", about {clock(last.seconds_left)} left"
    return f"trains: step {last.step} of {last.steps}{left}."


def _stopped(job: Job, last: Progress | None) -> str:
    kept = "What it has trained by then is saved" if (job.run / "adapter.safetensors").exists() else "Nothing is lost"
    return f"was stopped{_reached(last)}. {kept}; it can go on."


def _reached(last: Progress | None) -> str:
    return f" after step {last.step} of {last.steps}" if last else " before its first step"


def _took(last: Progress | None) -> str:
    return f": {last.steps} steps in {clock(last.seconds)}" if last else ""


def bar(steps: Sequence[Progress], phase: Phase | None = None) -> str:
    """A progress bar that a screen reader reads; only numbers go into it. `phase`: of what is no step, which counts if given."""
    if phase is not None and phase.total:
        return _bar(phase.done, phase.total, _counted(phase))
    if not steps:
        return ""
    last = steps[-1]
    left = "" if last.seconds_left is None or last.step >= last.steps else f", {clock(last.seconds_left)} left"
    return _bar(last.step, last.steps, f"{last.step} of {last.steps} steps{left}")


def _counted(phase: Phase) -> str:
    left = "" if phase.seconds_left is None or phase.done >= phase.total else f", about {clock(phase.seconds_left)} left"
    return f"{phase.done:,} of {phase.total:,}{left}"


def _bar(done: int, total: int, words: str) -> str:
    style = "width:100%;height:1.2em"
    return f'<progress style="{style}" max="{total}" value="{done}" aria-label="{words}">{words}</progress>'


def curve(steps: Sequence[Progress]) -> Any:
    """A table of the mean loss of the last steps by step, of at most `POINTS` rows; None while there are no two."""
    import pandas as pd

    if len(steps) < 2:
        return None
    every = max(1, -(-len(steps) // POINTS))
    kept = [*steps[:-1:every], steps[-1]]
    return pd.DataFrame({"step": [s.step for s in kept], "loss": [s.smoothed for s in kept]})
