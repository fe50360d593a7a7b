"""Descriptions of jobs: state in words, progress bar and loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.training.report.phases import Phase
from veneer.training.report.progress import Progress, clock

from ...context import Context, escape_markup
from ...jobs import Job
from ...workspace import printable
from .verdict import read_result, shortfall

POINTS = 300
"""Maximum points of a loss curve."""
PHASES = {
    "loading": "loads the base model", "class_images": "generates class images with the base model",
    "caching": "encodes photos and captions", "previews": "generates previews",
    "evaluating": "evaluates generated images", "saving": "saves its files",
}  # fmt: skip
"""Phases of a run other than training steps, in words."""
STATES = {"waiting": "waits", "running": "runs", "stopped": "stopped", "done": "done", "failed": "failed"}


def job_choices(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Choices of a dropdown: label and name of each job."""
    return [(f"{printable(job.title)} · {job.created} · {_shortfall(job) or STATES[job.state]}", job.name) for job in jobs]


def _shortfall(job: Job) -> str:
    """Verdict of a finished job that did not succeed, such as `not learned`; else empty."""
    return shortfall(read_result(job)) if job.state == "done" else ""


def describe(context: Context, job: Job, steps: Sequence[Progress]) -> str:
    """State of a job in Markdown, with its position in the queue."""
    state, last = job.state, steps[-1] if steps else None
    words = {
        "waiting": lambda: _describe_waiting(context, job),
        "running": lambda: _describe_running(job, last),
        "stopped": lambda: _describe_stopped(job, last),
        "done": lambda: (
            f"has ended, **{_shortfall(job)}**{_training_time(last)}." if _shortfall(job) else f"is done{_training_time(last)}."
        ),
        "failed": lambda: f"failed{_after_step(last)}. {escape_markup(job.failure())}",
    }[state]()
    return f"**{escape_markup(printable(job.title))}** {words}"


def _describe_waiting(context: Context, job: Job) -> str:
    ahead = context.queue.position(job) + sum(other.state == "running" for other in context.queue.jobs())
    again = " It was interrupted and resumes from its last checkpoint." if job.was_started else ""
    if ahead == 0:
        return f"starts in a moment.{again}"
    return f"is queued: {ahead} {'job is' if ahead == 1 else 'jobs are'} ahead of it.{again}"


def _describe_running(job: Job, last: Progress | None) -> str:
    if (job.folder / "stop").exists():
        return "stops after this step and saves the trained weights."
    phase = job.phase()
    if phase is not None:
        activity = PHASES.get(phase.phase, f"is in the phase {escape_markup(printable(phase.phase))}")
        return f"{activity}: {_count(phase)}." if phase.total else f"{activity}."
    if last is None:
        return "starts: it loads the base model and the data."
    if last.step >= last.steps:
        return "has finished its training steps; now it generates images and evaluates them."
    left = "" if last.seconds_left is None else f", about {clock(last.seconds_left)} left"
    return f"trains: step {last.step} of {last.steps}{left}."


def _describe_stopped(job: Job, last: Progress | None) -> str:
    saved = "The trained weights are saved" if (job.run / "adapter.safetensors").exists() else "Nothing is lost"
    return f"was stopped{_after_step(last)}. {saved}; it can be resumed."


def _after_step(last: Progress | None) -> str:
    return f" after step {last.step} of {last.steps}" if last else " before its first step"


def _training_time(last: Progress | None) -> str:
    return f": {last.steps} {'step' if last.steps == 1 else 'steps'} in {clock(last.seconds)}" if last else ""


def progress_bar(steps: Sequence[Progress], phase: Phase | None = None) -> str:
    """Accessible progress bar in HTML. `phase`: shown instead of the training steps if it has a total."""
    if phase is not None and phase.total:
        return _bar(phase.done, phase.total, _count(phase))
    if not steps:
        return ""
    last = steps[-1]
    left = "" if last.seconds_left is None or last.step >= last.steps else f", {clock(last.seconds_left)} left"
    return _bar(last.step, last.steps, f"{last.step} of {last.steps} steps{left}")


def _count(phase: Phase) -> str:
    left = "" if phase.seconds_left is None or phase.done >= phase.total else f", about {clock(phase.seconds_left)} left"
    return f"{phase.done:,} of {phase.total:,}{left}"


def _bar(done: int, total: int, words: str) -> str:
    style = "width:100%;height:1.2em"
    return f'<progress style="{style}" max="{total}" value="{done}" aria-label="{words}">{words}</progress>'


def loss_curve(steps: Sequence[Progress]) -> Any:
    """Table of the smoothed loss by step, of at most `POINTS` rows; None with fewer than two steps."""
    import pandas as pd

    if len(steps) < 2:
        return None
    every = max(1, -(-len(steps) // POINTS))
    points = [*steps[:-1:every], steps[-1]]
    return pd.DataFrame({"step": [s.step for s in points], "loss": [s.smoothed for s in points]})
