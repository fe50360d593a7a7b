"""Draw what follows a sketch, the lines of a photo, or another picture; and teach a base to do so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from veneer.control import maps
from veneer.control.maps import computed

from ..jobs import Job
from ..limits import LIMITS
from ..studio import Studio, escaped, explained
from ..workspace import Workspace
from . import Page
from ._control_draw import SOURCES, Brought, draw, follower, followers, guide, size_of
from ._control_teach import MOST_DRAWN, MOST_STEPS, Lesson, begin, conditions, usual_steps, ways
from ._events import DRAWS, QUIET
from ._fields import Fields, fields
from ._job import ADAPTER, Results, job_view, offered, picture, sheet_picture, shows
from ._lists import follow
from ._pictures import gallery, photo, sketchpad
from ._wish import STRONGEST, wished

NONE_YET = (
    "You have nothing to follow with yet. **Teach a control** below (the shipped base draws its own pictures to learn from, so a "
    "click is enough), or bring a file on the page *Adapters*."
)
READY = "Choose a control, draw a sketch or bring a photo, write a prompt, and press *Draw*."
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
                [], label="Control", elem_id="control-choice", info="What you have taught or brought that follows."
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
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=130, elem_id="control-draw")
                stop = gr.Button("Stop", min_width=80, elem_id="control-stop")
            state = gr.Markdown(NONE_YET, elem_id="control-said")
            pictures = gallery(
                "What is followed, without, and with", 3, buttons=["download", "fullscreen"], elem_id="control-gallery"
            )
    given = [choice, condition, source, sketch, brought]
    _wire(studio, places, given, [strength, start, end], (look, go, stop), (pictures, state), (on_sheet, on_disk))
    gr.Markdown("## Teach a control")
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
        return [[(_shown(picture), f"what is followed: {followed}")], "Press *Draw*."]

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
        base = gr.Dropdown(["shipped"], value="shipped", label="Base to teach", allow_custom_value=True, min_width=160)
        steps = gr.Number(
            usual_steps(usual, "shipped"), label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=120,
            info="More follow better. Try 100 for a first look.", elem_id="control-steps",
        )  # fmt: skip
        count = gr.Number(
            384, label="Pictures that the base draws", precision=0, minimum=8, maximum=MOST_DRAWN, min_width=160,
            info="To learn from, if you bring no photos.", elem_id="control-drawn",
        )  # fmt: skip
    with gr.Accordion("Learn from your own photos", open=False):
        photos = gr.File(
            label=f"Photos, at most {LIMITS.photos}", file_count="multiple", file_types=["image"], height=140,
            elem_id="control-photos",
        )  # fmt: skip
        caption = gr.Textbox(label="What the photos show", max_length=LIMITS.text, info="In a few words, such as: a house.")
    title = gr.Textbox(label="Name", max_length=80, info="For your list; may stay empty.", elem_id="control-title")
    go = gr.Button("Teach", variant="primary", elem_id="control-teach")
    note = gr.Markdown("", elem_id="control-note")
    view = job_view(studio, "control", Results(_results, _result), "No control has been taught yet. Press *Teach* to begin.")

    def start(request: gr.Request, *told: Any) -> list[Any]:
        way, what, over, number, drawn, files, words, name = told
        workspace = studio.workspace(request)
        job, refused = begin(studio, workspace, Lesson(way, what, over, number, files or (), words, drawn, name))
        return [shows(workspace, "control", job), "Left out: " + " ".join(map(escaped, refused)) if refused else ""]

    def fitting(way: str, over: str) -> list[Any]:
        follows = conditions(way)
        choices = FOLLOWED if follows != ["image"] else [("the picture itself", "image")]
        return [gr.Dropdown(choices=choices, value=follows[0]), usual_steps(way, over or "shipped")]

    form = [method, kind, base, steps, count, photos, caption, title]
    go.click(explained(start), form, [view.choice, note], queue=False, api_visibility="private")
    gr.on([method.input, base.input], explained(fitting), [method, base], [kind, steps], **QUIET)


def _results() -> Sequence[Any]:
    with gr.Row():
        return [
            sheet_picture("What was learnt: given, with, without, misled", elem_id="control-sheet"),
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
    return [gr.Image(value=page, visible=page is not None), gr.File(value=files or None, visible=bool(files))]


PAGE = Page("Control", "control", "Draw a sketch, or bring a photo, and draw a picture that follows it.", build)
