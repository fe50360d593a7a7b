"""View of jobs: selection, state, progress and actions. Every page that starts jobs uses it.

view = job_view(context, "train", Results(build, show))      # inside the page
start.click(begin, inputs, view.choice)                      # `begin` returns select_job(workspace, "train", job)
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from veneer.injection import StateError

from ...context import Context, show_errors
from ...jobs import Job
from ...watching import watch
from ...workspace import Workspace, safe_name
from .job_text import describe, job_choices, loss_curve, progress_bar

CONFIRM_DELETE = """(name) => { if (!confirm("Delete this run and its files?")) throw new Error("kept"); return [name] }"""
ADAPTER = "adapter.safetensors"
ENDED = ("stopped", "done", "failed")
Parts = dict[str, tuple[Any, Callable[[], Any]]]
"""Component name to cache key and factory of its new value."""


def _state(job: Job) -> Any:
    return job.state


@dataclass(frozen=True)
class Results:
    """Result components of one kind of job.

    Args:
        build: creates the components and returns them in the order of `show`.
        show: returns their new values for a job, or for None without a job. Values may be `gr.skip()`.
        stamp: cheap cache key; `show` is called only when it changes (default: the state of the job).
    """

    build: Callable[[], Sequence[Any]]
    show: Callable[[Job | None], Sequence[Any]]
    stamp: Callable[[Job], Any] = _state


NO_RESULTS = Results(list, lambda job: [])


@dataclass(frozen=True)
class JobView:
    """Components of the view that a page may need.

    Args:
        choice: dropdown of jobs; its value is a job's name. A handler that starts a job returns `select_job(...)` for it.
        extra: the components of `Results.build`.
    """

    choice: gr.Dropdown
    extra: list[Any]


def job_view(context: Context, kind: str, results: Results = NO_RESULTS, empty: str = "Nothing here yet.") -> JobView:
    """Creates the view: a dropdown of all jobs of a kind, newest first, and the state of the selected one.

    Args:
        kind: as passed to `Context.submit`. `results`: result components. `empty`: text shown without jobs.
    """
    known = gr.State(dict[str, Any]())
    choice = gr.Dropdown([], value=None, label="Run", allow_custom_value=True, visible=False, elem_id=f"{kind}-job")
    state = gr.Markdown(empty, elem_id=f"{kind}-state")
    progress = gr.HTML("", label="Progress", visible=False, elem_id=f"{kind}-progress")
    with gr.Row(elem_classes="acts"):
        small: dict[str, Any] = {"visible": False, "size": "sm", "scale": 0, "min_width": 140}
        stop = gr.Button("Stop and save", variant="stop", elem_id=f"{kind}-stop", **small)
        resume = gr.Button("Resume", variant="primary", elem_id=f"{kind}-on", **small)
        delete = gr.Button("Delete", elem_id=f"{kind}-delete", **small)
    extra = list(results.build())
    with gr.Row():
        preview = grid_image("Latest preview", elem_id=f"{kind}-preview")
        loss = gr.LinePlot(
            None, "step", "loss", label="Training loss, mean of 50 steps", visible=False, height=240, min_width=280, buttons=[],
            elem_id=f"{kind}-loss",
        )  # fmt: skip
    with gr.Accordion("Log", open=False, visible=False) as log_accordion:
        log = gr.Textbox(label="Log (last lines)", lines=10, max_lines=20, interactive=False, elem_id=f"{kind}-log")
    outputs = [choice, state, progress, stop, resume, delete, loss, preview, log_accordion, log, *extra, known]

    def newest(request: gr.Request) -> list[Any]:
        return refresh(context, context.workspace(request), kind, None, {}, results, empty)

    def update(name: str | None, previous: dict[str, Any], request: gr.Request) -> list[Any]:
        return refresh(context, context.workspace(request), kind, name, previous, results, empty)

    def handle_stop(name: str, previous: dict[str, Any], request: gr.Request) -> list[Any]:
        context.workspace(request).job(name).stop()
        return update(name, previous, request)

    def handle_resume(name: str, previous: dict[str, Any], request: gr.Request) -> list[Any]:
        resume_job(context.workspace(request), name)
        return update(name, previous, request)

    def handle_delete(name: str, request: gr.Request) -> list[Any]:
        delete_job(context.workspace(request), name)
        return newest(request)

    def stamps(request: gr.Request, name: str | None) -> dict[str, Any]:
        job, parts = _parts_of(context, context.workspace(request), kind, name, empty)
        return _stamps(job, parts, results)

    quiet: dict[str, Any] = {"outputs": outputs, "show_progress": "hidden", "queue": False, "api_visibility": "private"}
    gr.on(None, show_errors(newest), None, **quiet)
    choice.change(show_errors(update), [choice, known], **quiet)
    watch(f"{kind} jobs", stamps, [choice]).change(show_errors(update), [choice, known], **quiet)
    stop.click(show_errors(handle_stop), [choice, known], **quiet)
    resume.click(show_errors(handle_resume), [choice, known], **quiet)
    delete.click(show_errors(handle_delete), [choice], **quiet, js=CONFIRM_DELETE)
    return JobView(choice, extra)


def select_job(workspace: Workspace, kind: str, job: Job) -> Any:
    """Update of `JobView.choice` that selects this job, for the handler that started it."""
    return gr.Dropdown(choices=job_choices(of_kind(workspace, kind)), value=job.name, visible=True)


def of_kind(workspace: Workspace, kind: str) -> list[Job]:
    """Jobs of a page, newest first."""
    return [job for job in workspace.all_jobs() if job.kind == kind]


def refresh(
    context: Context, workspace: Workspace, kind: str, name: str | None, previous: dict[str, Any], results: Results, empty: str
) -> list[Any]:
    """New values of the components, `gr.skip()` for unchanged ones; the last value is the state to compare with next time."""
    job, parts = _parts_of(context, workspace, kind, name, empty)
    values = [create() if key not in previous or previous[key] != stamp else gr.skip() for key, (stamp, create) in parts.items()]
    stamps = _stamps(job, parts, results)
    if previous.get("results") != stamps["results"]:
        values += results.show(job)
    else:
        values += [gr.skip()] * previous.get("count", 0)
    stamps["count"] = len(values) - len(parts)
    return [*values, stamps if stamps != previous else gr.skip()]


def _parts_of(context: Context, workspace: Workspace, kind: str, name: str | None, empty: str) -> tuple[Job | None, Parts]:
    """The selected job, else the newest one, and the parts of the view for it."""
    jobs = of_kind(workspace, kind)
    job = next((job for job in jobs if job.name == name), jobs[0] if jobs else None)
    return job, {"choice": _choice(jobs, job), **_parts(context, job, empty)}


def _stamps(job: Job | None, parts: Parts, results: Results) -> dict[str, Any]:
    """What the view shows, to compare with."""
    stamps = {key: stamp for key, (stamp, _) in parts.items()}
    return {**stamps, "results": (job and job.name, job and results.stamp(job))}


def _choice(jobs: Sequence[Job], job: Job | None) -> tuple[Any, Callable[[], Any]]:
    choices, name = job_choices(jobs), job.name if job else None
    return (choices, name), lambda: gr.Dropdown(choices=choices, value=name, visible=bool(jobs))


def _parts(context: Context, job: Job | None, empty: str) -> Parts:
    """Component name to cache key and factory of its new value, in the order of the view."""
    steps = job.progress() if job else []
    state = job.state if job else ""
    words = describe(context, job, steps) if job else empty
    preview_file = (
        next(reversed(job.previews()), None) if job and state != "done" else None
    )  # a finished job shows its results instead
    log = job.log() if job else ""
    stoppable = state in ("waiting", "running") and job is not None and not (job.folder / "stop").exists()
    last = (job and job.name, steps[-1].step if steps else 0)
    line = progress_bar(steps, job.phase() if job and state == "running" else None) if state != "done" else ""
    return {
        "state": (words, lambda: words),
        "progress": (line, lambda: gr.HTML(line, visible=bool(line))),
        "stop": (stoppable, lambda: gr.Button(visible=stoppable)),
        "on": (state in ("stopped", "failed"), lambda: gr.Button(visible=state in ("stopped", "failed"))),
        "delete": (state in ENDED, lambda: gr.Button(visible=state in ENDED)),
        "loss": (last, lambda: gr.LinePlot(loss_curve(steps), visible=len(steps) > 1)),
        "preview": (str(preview_file), lambda: gr.Image(value=open_image(preview_file), visible=preview_file is not None)),
        "said": (bool(log), lambda: gr.Accordion(visible=bool(log))),
        "log": (log, lambda: log),
    }


def grid_image(label: str, **options: Any) -> gr.Image:
    """Hidden image component for an image grid of a job."""
    return gr.Image(
        label=label, visible=False, interactive=False, format="png", buttons=["download", "fullscreen"], min_width=280,
        elem_classes="sheet", **options,
    )  # fmt: skip


def open_image(path: Path | None) -> Image.Image | None:
    """Opens an image of the workspace; None if it does not exist."""
    try:
        with Image.open(path or "") as image:
            return image.convert("RGB")
    except OSError:  # missing, or not written completely yet
        return None


def copy_for_download(paths: Sequence[Path], title: str = "") -> list[str]:
    """Copies files of the workspace to a new temporary folder that Gradio may serve.

    Args:
        title: file name for `adapter.safetensors`, which has the same name in all jobs.
    """
    existing = [path for path in paths if path.exists()]
    folder = Path(tempfile.mkdtemp(prefix="veneer-")) if existing else Path()
    names = [f"{safe_name(title)}.safetensors" if title and path.name == ADAPTER else path.name for path in existing]
    return [shutil.copyfile(path, folder / name).as_posix() for path, name in zip(existing, names, strict=True)]


def resume_job(workspace: Workspace, name: str) -> None:
    """Puts a stopped or failed job back into the queue.

    Raises:
        VeneerError: unknown job, a job in another state, or too many queued jobs.
    """
    job = workspace.job(name)
    if job.state not in ("stopped", "failed"):
        message = "only a stopped or failed job can be resumed."
        raise StateError(message, where=name, given=job.state, expected=("stopped", "failed"))
    workspace.check_queue()
    job.resume()


def delete_job(workspace: Workspace, name: str) -> None:
    """Deletes a job that has ended, and its training data unless another job uses it.

    Raises:
        VeneerError: unknown job, or one that waits or runs, or whose adapter such a job trains from.
    """
    job = workspace.job(name)
    if job.state not in ENDED:
        raise StateError("the job has not ended. Stop it first.", where=name, given=job.state, expected=tuple(ENDED))
    workspace.check_unused(job.folder)
    shared = {folder for other in workspace.all_jobs() if other != job for folder in workspace.datasets_in(other.command)}
    for folder in workspace.datasets_in(job.command) - shared:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(job.folder)
