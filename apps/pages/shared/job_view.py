"""A job on a page: which one, how it goes, and what can be done with it. Every page that starts jobs shows them by this.

view = job_view(studio, "teach", Results(build, show))       # inside the page
start.click(begin, inputs, view.choice)                      # `begin` returns shows(workspace, "teach", job)
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

from ...context import Studio, explained
from ...jobs import Job
from ...workspace import Workspace, safe
from .job_text import bar, curve, listed, told

SECONDS = 2.0
"""Between two looks at a job."""
SURE = """(name) => { if (!confirm("Delete this run and its files?")) throw new Error("kept"); return [name] }"""
ADAPTER = "adapter.safetensors"
ENDED = ("stopped", "done", "failed")


def _state(job: Job) -> Any:
    return job.state


@dataclass(frozen=True)
class Results:
    """What a page adds below a job of its kind.

    Args:
        build: makes its components in their place, and gives those that `show` fills, in that order.
        show: their new values for a job, or for None where none is chosen; as many as `build` gave. Values may be `gr.skip()`.
        stamp: `show` is called anew only when this changes, such as the state (usual) or what lies in `run/`. Must be cheap.
    """

    build: Callable[[], Sequence[Any]]
    show: Callable[[Job | None], Sequence[Any]]
    stamp: Callable[[Job], Any] = _state


NOTHING = Results(list, lambda job: [])


@dataclass(frozen=True)
class JobView:
    """The parts that a page may need.

    Args:
        choice: the list of jobs; its value is a job's name. A handler that starts a job returns `shows(...)` for it.
        timer: ticks every `SECONDS`. `extra`: what `Results.build` gave.
    """

    choice: gr.Dropdown
    timer: gr.Timer
    extra: list[Any]


def job_view(studio: Studio, kind: str, results: Results = NOTHING, empty: str = "Nothing here yet.") -> JobView:
    """Jobs of a kind: a list that begins with the newest, so that a reload and a second tab find it, and the chosen one.

    Args:
        kind: as given to `studio.begin`. `results`: what the page adds. `empty`: what to do while there are none.
    """
    seen = gr.State(dict[str, Any]())
    choice = gr.Dropdown([], value=None, label="Run", allow_custom_value=True, visible=False, elem_id=f"{kind}-job")
    state = gr.Markdown(empty, elem_id=f"{kind}-state")
    progress = gr.HTML("", label="Progress", visible=False, elem_id=f"{kind}-progress")
    with gr.Row(elem_classes="acts"):
        small: dict[str, Any] = {"visible": False, "size": "sm", "scale": 0, "min_width": 140}
        stop = gr.Button("Stop and keep", variant="stop", elem_id=f"{kind}-stop", **small)
        on = gr.Button("Resume", variant="primary", elem_id=f"{kind}-on", **small)
        delete = gr.Button("Delete", elem_id=f"{kind}-delete", **small)
    extra = list(results.build())
    with gr.Row():
        preview = sheet_picture("Newest preview", elem_id=f"{kind}-preview")
        loss = gr.LinePlot(
            None, "step", "loss", label="Training loss, mean of 50 steps", visible=False, height=240, min_width=280, buttons=[],
            elem_id=f"{kind}-loss",
        )  # fmt: skip
    with gr.Accordion("Log", open=False, visible=False) as said:
        log = gr.Textbox(label="End of the log", lines=10, max_lines=20, interactive=False, elem_id=f"{kind}-log")
    shown = [choice, state, progress, stop, on, delete, loss, preview, said, log, *extra, seen]

    def newest(request: gr.Request) -> list[Any]:
        return look(studio, studio.workspace(request), kind, None, {}, results, empty)

    def news(name: str | None, before: dict[str, Any], request: gr.Request) -> list[Any]:
        return look(studio, studio.workspace(request), kind, name, before, results, empty)

    def to_stop(name: str, before: dict[str, Any], request: gr.Request) -> list[Any]:
        studio.workspace(request).job(name).stop()
        return news(name, before, request)

    def to_go_on(name: str, before: dict[str, Any], request: gr.Request) -> list[Any]:
        go_on(studio.workspace(request), name)
        return news(name, before, request)

    def to_delete(name: str, request: gr.Request) -> list[Any]:
        remove(studio.workspace(request), name)
        return newest(request)

    quiet: dict[str, Any] = {"outputs": shown, "show_progress": "hidden", "queue": False, "api_visibility": "private"}
    timer = gr.Timer(SECONDS)
    gr.on(None, explained(newest), None, **quiet)
    choice.change(explained(news), [choice, seen], **quiet)
    timer.tick(explained(news), [choice, seen], **quiet)
    stop.click(explained(to_stop), [choice, seen], **quiet)
    on.click(explained(to_go_on), [choice, seen], **quiet)
    delete.click(explained(to_delete), [choice], **quiet, js=SURE)
    return JobView(choice, timer, extra)


def shows(workspace: Workspace, kind: str, job: Job) -> Any:
    """The list with this job chosen: what a handler that started it returns for `JobView.choice`."""
    return gr.Dropdown(choices=listed(of_kind(workspace, kind)), value=job.name, visible=True)


def of_kind(workspace: Workspace, kind: str) -> list[Job]:
    """Jobs of a page, the newest first."""
    return [job for job in workspace.all_jobs() if job.about.get("kind") == kind]


def look(
    studio: Studio, workspace: Workspace, kind: str, name: str | None, before: dict[str, Any], results: Results, empty: str
) -> list[Any]:
    """New values of the view's components, `gr.skip()` for what is as `before`; the last is what to compare with next time."""
    jobs = of_kind(workspace, kind)
    job = next((job for job in jobs if job.name == name), jobs[0] if jobs else None)
    now: dict[str, tuple[Any, Callable[[], Any]]] = {"choice": _choice(jobs, job)}
    now |= _parts(studio, job, empty)
    values = [make() if key not in before or before[key] != stamp else gr.skip() for key, (stamp, make) in now.items()]
    stamps = {key: stamp for key, (stamp, _) in now.items()}
    stamps["results"] = (job and job.name, job and results.stamp(job))
    if before.get("results") != stamps["results"]:
        values += results.show(job)
    else:
        values += [gr.skip()] * before.get("count", 0)
    stamps["count"] = len(values) - len(now)
    return [*values, stamps if stamps != before else gr.skip()]


def _choice(jobs: Sequence[Job], job: Job | None) -> tuple[Any, Callable[[], Any]]:
    choices, name = listed(jobs), job.name if job else None
    return (choices, name), lambda: gr.Dropdown(choices=choices, value=name, visible=bool(jobs))


def _parts(studio: Studio, job: Job | None, empty: str) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Component to what it depends on, and how its new value is made; in the order of the view."""
    steps = job.progress() if job else []
    state = job.state if job else ""
    words = told(studio, job, steps) if job else empty
    drawn = next(reversed(job.previews()), None) if job and state != "done" else None  # then there are results
    log = job.log() if job else ""
    ends = state in ("waiting", "running") and job is not None and not (job.folder / "stop").exists()
    last = (job and job.name, steps[-1].step if steps else 0)
    line = bar(steps, job.phase() if job and state == "running" else None) if state != "done" else ""
    return {
        "state": (words, lambda: words),
        "progress": (line, lambda: gr.HTML(line, visible=bool(line))),
        "stop": (ends, lambda: gr.Button(visible=ends)),
        "on": (state in ("stopped", "failed"), lambda: gr.Button(visible=state in ("stopped", "failed"))),
        "delete": (state in ENDED, lambda: gr.Button(visible=state in ENDED)),
        "loss": (last, lambda: gr.LinePlot(curve(steps), visible=len(steps) > 1)),
        "preview": (str(drawn), lambda: gr.Image(value=picture(drawn), visible=drawn is not None)),
        "said": (bool(log), lambda: gr.Accordion(visible=bool(log))),
        "log": (log, lambda: log),
    }


def sheet_picture(label: str, **options: Any) -> gr.Image:
    """A place for a sheet that a job has written, hidden while there is none."""
    return gr.Image(
        label=label, visible=False, interactive=False, format="png", buttons=["download", "fullscreen"], min_width=280,
        elem_classes="sheet", **options,
    )  # fmt: skip


def picture(path: Path | None) -> Image.Image | None:
    """A picture of the workspace, to be shown."""
    try:
        with Image.open(path or "") as image:
            return image.convert("RGB")
    except OSError:  # not there, or not yet
        return None


def offered(paths: Sequence[Path], title: str = "") -> list[str]:
    """Copies of files of the workspace in a fresh folder, from where a page may give them.

    Args:
        title: what `adapter.safetensors` is called then, as all jobs have a file of that name.
    """
    there = [path for path in paths if path.exists()]
    folder = Path(tempfile.mkdtemp(prefix="veneer-")) if there else Path()
    names = [f"{safe(title)}.safetensors" if title and path.name == ADAPTER else path.name for path in there]
    return [shutil.copyfile(path, folder / name).as_posix() for path, name in zip(there, names, strict=True)]


def go_on(workspace: Workspace, name: str) -> None:
    """A job that was stopped or failed waits for its turn again.

    Raises:
        VeneerError: there is no such job, it has not ended so, or too many wait.
    """
    job = workspace.job(name)
    if job.state not in ("stopped", "failed"):
        message = "only a job that was stopped or failed can go on."
        raise StateError(message, where=name, given=job.state, expected=("stopped", "failed"))
    workspace.check_room()
    job.go_on()


def remove(workspace: Workspace, name: str) -> None:
    """Delete a job that has ended, and what it was given, if no other job was given the same.

    Raises:
        VeneerError: there is no such job, or it waits or runs.
    """
    job = workspace.job(name)
    if job.state not in ENDED:
        raise StateError("it has not ended: stop it first.", where=name, given=job.state, expected=tuple(ENDED))
    shared = {word for other in workspace.all_jobs() if other != job for word in other.about.get("words", [])}
    for word in job.about.get("words", []):
        if Path(word).resolve().parent == workspace.given.resolve() and word not in shared:
            shutil.rmtree(word, ignore_errors=True)
    shutil.rmtree(job.folder)
