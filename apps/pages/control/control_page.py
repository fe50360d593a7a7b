"""Draw what follows a sketch, the lines of a photo, or another picture; and teach a base to do so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from veneer.control.maps import maps
from veneer.control.maps.maps import computed
from veneer.injection import VeneerError

from ...context import Studio, escaped, explained
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace
from ..page import Page
from ..shared.adapter_lists import follow
from ..shared.events import DRAWS, QUIET
from ..shared.generation_fields import Fields, fields
from ..shared.generation_request import STRONGEST, wished
from ..shared.images import gallery, photo, sketchpad
from ..shared.job_view import ADAPTER, Results, job_view, offered, picture, sheet_picture, shows
from ..shared.time_estimates import REFERENCE, duration
from ..shared.verdict import read_result, verdict
from .generation import SOURCES, Brought, draw, follower, followers, guide, size_of
from .training import MOST_DRAWN, MOST_STEPS, Lesson, begin, chosen, conditions, expected, lengths, ways

NONE_YET = (
    "You have no control yet. **Train a control** below (the bundled base generates its own images to train on, so a click is "
    "enough), or bring a file on the page *Adapters*."
)
READY = "Choose a control, draw a sketch or bring a photo, write a prompt, and press *Generate*."
ABOUT = {
    "controlnet": "a copy of half of the base that reads the map; follows best",
    "t2i_adapter": "a small network beside the base; quick",
    "controlnext": "a very small network; trains a few weights of the base as well",
    "ip_adapter": "follows what is in a picture, not where it is",
}
FOLLOWED = [(f"{name}: {maps.get(name).description}", name) for name in computed()]


def build(studio: Studio) -> None:
    """The page."""
    with gr.Row():
        with gr.Column(min_width=300):
            choice = gr.Dropdown(
                [],
                label="Control",
                elem_id="control-choice",
                info="Trained or brought: it follows a map or an image.",
            )
            condition = gr.Dropdown(
                FOLLOWED, value="canny", label="It follows", info="For a control whose file does not say, and to look at maps.",
            )  # fmt: skip
            source = gr.Radio(list(SOURCES.items()), value="sketch", label="What to follow", elem_id="control-source")
            with gr.Column() as on_sheet:
                sketch = sketchpad("Sketch", elem_id="control-sketch")
            with gr.Column(visible=False) as on_disk:
                brought = photo("Photo or map", height=260, elem_id="control-photo")
            look = gr.Button("Show what will be followed", size="sm", elem_id="control-look")
            strength = gr.Slider(
                0, STRONGEST, value=1.0, step=0.05, label="Strength", info="0: not at all", elem_id="control-strength"
            )
            with gr.Row():
                start = gr.Slider(0, 1, value=0.0, step=0.05, label="Start", info="0: the first step", min_width=230)
                end = gr.Slider(0, 1, value=1.0, step=0.05, label="End", info="1: the last step", min_width=230)
        with gr.Column(min_width=300):
            places = fields("control", "an apple")
            with gr.Row(elem_classes="action"):
                go = gr.Button("Generate", variant="primary", min_width=130, elem_id="control-draw")
                stop = gr.Button("Stop", min_width=80, elem_id="control-draw-stop")
            state = gr.Markdown(NONE_YET, elem_id="control-said")
            pictures = gallery(
                "What is followed, without, and with", 3, buttons=["download", "fullscreen"], elem_id="control-gallery"
            )
    given = [choice, condition, source, sketch, brought]
    _wire(studio, places, given, [strength, start, end], (look, go, stop), (pictures, state), (on_sheet, on_disk))
    gr.Markdown("## Train a control", elem_id="control-train")
    with gr.Column():  # within which its main button stays in view
        _lessons(studio)


def _wire(studio: Studio, places: Fields, given: Any, ranges: Any, buttons: Any, shown: Any, sides: Any) -> None:
    """Looking at what is followed, and drawing."""
    choice, condition, source, *_ = given
    pictures, state = shown
    count = len(places.all())

    def run(request: gr.Request, *told: Any) -> Iterator[list[Any]]:
        name, kind, *brought = told[count : count + 5]
        found = follower(studio.workspace(request), name, kind)
        for drawn, words in draw(studio, found, name, wished(*told[:count]), Brought(*brought), *told[count + 5 :]):
            yield [drawn, words]

    def looked(request: gr.Request, *told: Any) -> list[Any]:
        name, kind, *brought = told[count : count + 5]
        followed = follower(studio.workspace(request), name, kind).condition if name else maps.get(str(kind)).name
        places_told = [told[0], told[1] or "x", *told[2:count]]
        picture = guide(str(followed), Brought(*brought), size_of(studio, wished(*places_told)))
        return [[(_shown(picture), f"what is followed: {followed}")], "Press *Generate*."]

    def listed(workspace: Workspace, name: str | None) -> list[Any]:
        found = followers(workspace)
        now = name if name in found else next(iter(found), None)
        choices = [(f"{each} · follows {f.condition or '?'}", each) for each, f in found.items()]
        return [gr.Dropdown(choices=choices, value=now), gr.skip() if now == name else READY]

    def asks_what(request: gr.Request, name: str | None) -> Any:
        found = followers(studio.workspace(request)).get(str(name))
        return gr.Dropdown(visible=found is None or found.condition is None)

    look, go, stop = buttons
    outputs = {"outputs": [pictures, state], **DRAWS}
    events = [each(explained(run), [*places.all(), *given, *ranges], **outputs) for each in (go.click, places.prompt.submit)]
    stop.click(None, cancels=events, **QUIET)
    look.click(explained(looked), [*places.all(), *given], **outputs)
    follow(studio, [choice, state], listed, choice)
    choice.change(explained(asks_what), [choice], [condition], **QUIET)
    source.change(
        lambda way: [gr.Column(visible=way == "sketch"), gr.Column(visible=way != "sketch")], [source], [*sides], **QUIET
    )


def _shown(picture: Image.Image, least: int = 256) -> Image.Image:
    """A small map enlarged, so that its pixels are seen."""
    times = max(1, least // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _lessons(studio: Studio) -> None:
    """The form that starts a job, and the jobs."""
    usual = ways()[0]
    with gr.Row():
        method = gr.Dropdown(
            [(f"{name}: {ABOUT[name]}" if name in ABOUT else name, name) for name in ways()], value=usual, label="Method",
            min_width=260, elem_id="control-method",
        )  # fmt: skip
        kind = gr.Dropdown(FOLLOWED, value="canny", label="What it follows", min_width=260, elem_id="control-condition")
    with gr.Row():
        base = gr.Dropdown(["bundled"], value="bundled", label="Base to train", allow_custom_value=True, min_width=160)
        preset = gr.Radio(
            lengths(usual, "bundled"), value="balanced", label="How long", min_width=320, elem_id="control-preset",
            info="Quick follows place and outline; thorough also follows details.",
        )  # fmt: skip
    many = chosen("balanced", usual, "bundled")
    with gr.Accordion("Steps and images", open=False), gr.Row():
        steps = gr.Number(
            many[0], label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=120,
            info="More follow the map better. Fewer than 200 hardly follow it.", elem_id="control-steps",
        )  # fmt: skip
        count = gr.Number(
            many[1], label="Images that the base generates", precision=0, minimum=8, maximum=MOST_DRAWN, min_width=160,
            info="To train on, if you bring no photos.", elem_id="control-drawn",
        )  # fmt: skip
    with gr.Accordion("Train on your own photos", open=False):
        photos = gr.File(
            label=f"Photos, at most {LIMITS.photos}", file_count="multiple", file_types=["image"], height=140,
            elem_id="control-photos",
        )  # fmt: skip
        caption = gr.Textbox(label="What the photos show", max_length=LIMITS.text, info="In a few words, such as: a house.")
    title = gr.Textbox(label="Name", max_length=80, info="For your list; may stay empty.", elem_id="control-title")
    cost = gr.Markdown(estimated(None, usual, "bundled", *many), elem_id="control-estimate")
    with gr.Row(elem_classes="action"):
        go = gr.Button("Train", variant="primary", elem_id="control-teach")
    note = gr.Markdown("", elem_id="control-note")
    view = job_view(studio, "control", Results(_results, _result), "No control has been trained yet. Press *Train* to begin.")

    def start(request: gr.Request, *told: Any) -> list[Any]:
        way, what, over, number, drawn, files, words, name = told
        workspace = studio.workspace(request)
        job, refused = begin(studio, workspace, Lesson(way, what, over, number, files or (), words, drawn, name))
        return [shows(workspace, "control", job), "Left out: " + " ".join(map(escaped, refused)) if refused else ""]

    def fitting(way: str, over: str, length: str) -> list[Any]:
        follows = conditions(way)
        choices = FOLLOWED if follows != ["image"] else [("the picture itself", "image")]
        return [gr.Dropdown(choices=choices, value=follows[0]), *chosen(length, way, over or "bundled")]

    def sized(length: str, way: str, over: str) -> list[int]:
        return list(chosen(length, way, over or "bundled"))

    def priced(way: str, over: str, number: Any, images: Any, request: gr.Request) -> list[Any]:
        workspace = studio.workspace(request)
        return [estimated(workspace, way, over, number, images), gr.Radio(choices=lengths(way, over or "bundled", workspace))]

    form = [method, kind, base, steps, count, photos, caption, title]
    began = go.click(explained(start), form, [view.choice, note], queue=False, api_visibility="private")
    began.success(None, js="() => reveal('control-state')", **QUIET)
    gr.on([method.input, base.input], explained(fitting), [method, base, preset], [kind, steps, count], **QUIET)
    preset.input(explained(sized), [preset, method, base], [steps, count], **QUIET)
    for when in (None, [method.change, base.change, steps.change, count.change]):
        gr.on(when, explained(priced), [method, base, steps, count], [cost, preset], **QUIET)


def estimated(workspace: Workspace | None, method: str, base: str, steps: Any, images: Any) -> str:
    """The time that a job should take, in words; nothing while a field is not yet filled in."""
    try:
        seconds = expected(method, base or "bundled", int(steps), int(images), workspace)
    except (VeneerError, TypeError, ValueError):
        return ""
    if seconds is None:
        return "Estimate: the time is known after the first steps."
    by = "going by your last run on this base" if workspace and _ran(workspace, base) else REFERENCE
    return f"Estimate: {duration(seconds)} in all, with the images to train on and the evaluation, {by}."


def _ran(workspace: Workspace, base: str) -> bool:
    return any(
        job.about.get("kind") == "control" and f"--base={base}" in job.about.get("words", []) and job.state == "done"
        for job in workspace.all_jobs()
    )


def _results() -> Sequence[Any]:
    judged = gr.HTML(visible=False, elem_id="control-verdict")
    with gr.Row():
        return [
            judged,
            sheet_picture("Evaluation: map, with it, without, with another map", elem_id="control-sheet"),
            gr.File(
                label="Download", visible=False, interactive=False, file_count="multiple", min_width=200, elem_id="control-files"
            ),
        ]


def _result(job: Job | None) -> Sequence[Any]:
    """The sheet of drawings and the files of a job that has ended."""
    run = job.run if job else Path()
    page = picture(run / "sheet.png") if job else None
    there = [run / ADAPTER, *run.glob("diffusers/*.*"), *run.glob("controlnext/*.*")] if job else []
    files = offered(there, job.title if job else "")
    said = verdict(read_result(job)) if job else ""
    return [
        gr.HTML(said, visible=bool(said)),
        gr.Image(value=page, visible=page is not None),
        gr.File(value=files or None, visible=bool(files)),
    ]


PAGE = Page("Control", "control", "Draw a sketch, or bring a photo, and generate an image that follows it.", build)
