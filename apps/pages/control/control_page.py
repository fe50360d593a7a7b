"""Page Control: generate with a control adapter from a sketch or photo, and train control adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from veneer.control.maps import maps
from veneer.control.maps.maps import computed
from veneer.injection import VeneerError

from ...context import Context, escape_markup, show_errors
from ...image_store import store_images
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace
from ..page import Page
from ..shared.adapter_lists import refresh_on_change
from ..shared.events import GENERATION, QUIET
from ..shared.generation_fields import Fields, fields
from ..shared.generation_request import MAX_STRENGTH, parse_request
from ..shared.html import section, step
from ..shared.images import gallery, photo_input, sketchpad
from ..shared.job_view import ADAPTER, JobView, Results, copy_for_download, grid_image, job_view, open_image, select_job
from ..shared.time_estimates import REFERENCE, duration
from ..shared.verdict import read_result, verdict_html
from ..showcase.showcase import control_examples
from .generation import SOURCES, ConditionInput, condition_image, control_adapter, control_adapters, generate, output_size
from .pairs import ABOUT as ABOUT_PAIRS
from .training import (
    MAX_IMAGES,
    MAX_STEPS,
    ControlTrainingRequest,
    conditions,
    control_methods,
    expected_seconds,
    preset_choices,
    preset_lengths,
    start_job,
)

NONE_YET = (
    "You have no control adapter yet. **Train one** below (the bundled model generates its own training images, so one click is "
    "enough), or upload a file on the page *Adapters*."
)
READY = "Choose a control adapter, make a sketch or upload a photo, write a prompt, and press *Generate*."
ABOUT = {
    "controlnet": "a copy of the encoder that reads the map; most accurate",
    "t2i_adapter": "a small network beside the base model; fast",
    "controlnext": "a very small network; also trains some base weights",
    "ip_adapter": "follows the content of an image, not its layout",
}
FOLLOWED = [(f"{name}: {maps.get(name).description}", name) for name in computed()]


def build(context: Context) -> JobView:
    """Builds the page; returns the view of its runs."""
    with gr.Row():
        with gr.Column(min_width=300):
            gr.HTML(step(1, "Sketch or photo", "that the image follows"))
            choice = gr.Dropdown(
                [],
                label="Control adapter",
                elem_id="control-choice",
                info="Trained here or uploaded.",
            )
            condition = gr.Dropdown(
                FOLLOWED, value="canny", label="Map type", info="For files that do not state it, and to preview maps.",
            )  # fmt: skip
            source = gr.Radio(list(SOURCES.items()), value="sketch", label="Condition on", elem_id="control-source")
            with gr.Column() as sketch_column:
                sketch = sketchpad("Sketch", elem_id="control-sketch")
            with gr.Column(visible=False) as photo_column:
                inputs = photo_input("Photo or map", height=260, elem_id="control-photo")
            look = gr.Button("Preview the map", size="sm", elem_id="control-look")
            strength = gr.Slider(
                0, MAX_STRENGTH, value=1.0, step=0.05, label="Strength", info="0: no effect", elem_id="control-strength"
            )
            with gr.Row():
                start = gr.Slider(0, 1, value=0.0, step=0.05, label="Start", info="0: first step", min_width=230)
                end = gr.Slider(0, 1, value=1.0, step=0.05, label="End", info="1: last step", min_width=230)
        with gr.Column(min_width=300):
            gr.HTML(step(2, "Prompt"))
            fields_ = fields("control", "an apple")
            with gr.Row(elem_classes="action"):
                go = gr.Button("Generate", variant="primary", scale=3, min_width=130, elem_id="control-draw")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="control-draw-stop")
            state = gr.Markdown(NONE_YET, elem_id="control-said")
            examples = gr.HTML(control_examples(), elem_id="control-examples")
            pictures = gallery("Map, without and with control", 3, buttons=["download", "fullscreen"], elem_id="control-gallery")
    condition_inputs = [choice, condition, source, sketch, inputs]
    _wire(
        context,
        fields_,
        condition_inputs,
        [strength, start, end],
        (look, go, stop),
        (pictures, state),
        (sketch_column, photo_column),
    )
    pictures.change(lambda: gr.HTML(visible=False), None, examples, **QUIET)
    gr.HTML(
        section("Train a control adapter", "Without photos, the base model generates the training images."),
        elem_id="control-train",
    )
    with gr.Column():  # keeps the main button in view within the form
        return _training_form(context)


def _wire(context: Context, fields_: Fields, condition_inputs: Any, ranges: Any, buttons: Any, outputs_: Any, sides: Any) -> None:
    """Connects map preview and generation."""
    choice, condition, source, *_ = condition_inputs
    pictures, state = outputs_
    count = len(fields_.all())

    def run(request: gr.Request, *form_values: Any) -> Iterator[list[Any]]:
        name, kind, *inputs = form_values[count : count + 5]
        workspace, generation = context.workspace(request), parse_request(*form_values[:count])
        adapter = control_adapter(workspace, name, kind)
        updates = generate(context, adapter, name, generation, ConditionInput(*inputs), *form_values[count + 5 :])
        for items, progress in store_images(workspace, updates):
            if len(items) == 1:  # the map; no image is generated yet
                context.images.take(workspace.user, 2 * generation.count)
            yield [items, progress]

    def show_condition(request: gr.Request, *form_values: Any) -> list[Any]:
        name, kind, *inputs = form_values[count : count + 5]
        followed = control_adapter(context.workspace(request), name, kind).condition if name else maps.get(str(kind)).name
        values = [form_values[0], form_values[1] or "x", *form_values[2:count]]
        image = condition_image(str(followed), ConditionInput(*inputs), output_size(context, parse_request(*values)))
        return [[(_enlarge(image), f"map: {followed}")], "Press *Generate*."]

    def refresh_choice(workspace: Workspace, name: str | None) -> list[Any]:
        adapter = control_adapters(workspace)
        now = name if name in adapter else next(iter(adapter), None)
        choices = [(f"{each} · follows {f.condition or '?'}", each) for each, f in adapter.items()]
        return [gr.Dropdown(choices=choices, value=now), gr.skip() if now == name else READY]

    def toggle_condition(request: gr.Request, name: str | None) -> Any:
        adapter = control_adapters(context.workspace(request)).get(str(name))
        return gr.Dropdown(visible=adapter is None or adapter.condition is None)

    look, go, stop = buttons
    outputs = {"outputs": [pictures, state], **GENERATION}
    events = [
        each(show_errors(run), [*fields_.all(), *condition_inputs, *ranges], **outputs)
        for each in (go.click, fields_.prompt.submit)
    ]
    stop.click(None, cancels=events, **QUIET)
    look.click(show_errors(show_condition), [*fields_.all(), *condition_inputs], **outputs)
    refresh_on_change(context, [choice, state], refresh_choice, choice)
    choice.change(show_errors(toggle_condition), [choice], [condition], **QUIET)
    source.change(
        lambda way: [gr.Column(visible=way == "sketch"), gr.Column(visible=way != "sketch")], [source], [*sides], **QUIET
    )


def _enlarge(image: Image.Image, least: int = 256) -> Image.Image:
    """Enlarges a small map without interpolation."""
    times = max(1, least // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _training_form(context: Context) -> JobView:
    """Training form and job view; returns the view."""
    default = control_methods()[0]
    with gr.Row():
        method = gr.Dropdown(
            [(f"{name}: {ABOUT[name]}" if name in ABOUT else name, name) for name in control_methods()], value=default,
            label="Method", min_width=260, elem_id="control-method",
        )  # fmt: skip
        kind = gr.Dropdown(FOLLOWED, value="canny", label="Map type", min_width=260, elem_id="control-condition")
    with gr.Row():
        base = gr.Dropdown(["bundled"], value="bundled", label="Base model", allow_custom_value=True, min_width=160)
        preset = gr.Radio(
            preset_choices(default, "bundled"), value="balanced", label="Preset", min_width=320, elem_id="control-preset",
            info="Quick follows position and outline; thorough also follows details.",
        )  # fmt: skip
    preset_counts = preset_lengths("balanced", default, "bundled")
    with gr.Accordion("Steps and images", open=False), gr.Row():
        steps = gr.Number(
            preset_counts[0], label="Steps", precision=0, minimum=1, maximum=MAX_STEPS, min_width=120,
            info="More steps follow the map more closely; below 200 the effect is weak.", elem_id="control-steps",
        )  # fmt: skip
        count = gr.Number(
            preset_counts[1], label="Generated training images", precision=0, minimum=8, maximum=MAX_IMAGES, min_width=160,
            info="Generated by the base model if you upload no photos.", elem_id="control-drawn",
        )  # fmt: skip
    with gr.Accordion("Train on your own photos or pairs", open=False):
        photos = gr.File(
            label=f"Photos, at most {LIMITS.photos}", file_count="multiple", file_types=["image"], height=140,
            elem_id="control-photos",
        )  # fmt: skip
        pairs = gr.File(label="Or pairs, as a zip", file_types=[".zip"], height=110, elem_id="control-pairs")
        gr.Markdown(ABOUT_PAIRS, elem_classes="about")
        caption = gr.Textbox(label="Caption of the photos", max_length=LIMITS.text, info="A few words, such as: a house.")
    title = gr.Textbox(label="Name", max_length=80, info="Optional, for the list of adapters.", elem_id="control-title")
    estimate = gr.Markdown(estimate_text(None, default, "bundled", *preset_counts), elem_id="control-estimate")
    with gr.Row(elem_classes="action"):
        go = gr.Button("Train", variant="primary", elem_id="control-train-start")
    note = gr.Markdown("", elem_id="control-note")
    view = job_view(
        context,
        "control",
        Results(_result_components, _result_values),
        "No run yet. Press *Train* to start.",
    )

    def start(request: gr.Request, *form_values: Any) -> list[Any]:
        method_name, condition_name, base_name, number, images, files, caption_text, name, archive = form_values
        workspace = context.workspace(request)
        job, refused = start_job(
            context,
            workspace,
            ControlTrainingRequest(
                method_name, condition_name, base_name, number, files or (), caption_text, images, name, archive
            ),
        )
        return [select_job(workspace, "control", job), "Left out: " + " ".join(map(escape_markup, refused)) if refused else ""]

    def fit_condition(method_name: str, base_name: str, length: str) -> list[Any]:
        follows = conditions(method_name)
        choices = FOLLOWED if follows != ["image"] else [("the image itself", "image")]
        return [gr.Dropdown(choices=choices, value=follows[0]), *preset_lengths(length, method_name, base_name or "bundled")]

    def fill_preset(length: str, method_name: str, base_name: str) -> list[int]:
        return list(preset_lengths(length, method_name, base_name or "bundled"))

    def update_estimate(method_name: str, base_name: str, number: Any, images: Any, request: gr.Request) -> list[Any]:
        workspace = context.workspace(request)
        return [
            estimate_text(workspace, method_name, base_name, number, images),
            gr.Radio(choices=preset_choices(method_name, base_name or "bundled", workspace)),
        ]

    form = [method, kind, base, steps, count, photos, caption, title, pairs]
    began = go.click(show_errors(start), form, [view.choice, note], queue=False, api_visibility="private")
    began.success(None, js="() => reveal('control-state')", **QUIET)
    gr.on([method.input, base.input], show_errors(fit_condition), [method, base, preset], [kind, steps, count], **QUIET)
    preset.input(show_errors(fill_preset), [preset, method, base], [steps, count], **QUIET)
    for when in (None, [method.change, base.change, steps.change, count.change]):
        gr.on(when, show_errors(update_estimate), [method, base, steps, count], [estimate, preset], **QUIET)
    return view


def estimate_text(workspace: Workspace | None, method: str, base: str, steps: Any, images: Any) -> str:
    """Estimated time of a job; empty while a field is incomplete."""
    try:
        seconds = expected_seconds(method, base or "bundled", int(steps), int(images), workspace)
    except (VeneerError, TypeError, ValueError):
        return ""
    if seconds is None:
        return "Estimate: the time is known after the first steps."
    by = "based on your last run with this base model" if workspace and _has_run(workspace, base) else REFERENCE
    return f"Estimate: {duration(seconds)} in all, including training images and evaluation, {by}."


def _has_run(workspace: Workspace, base: str) -> bool:
    return any(job.kind == "control" and f"--base={base}" in job.command and job.state == "done" for job in workspace.all_jobs())


def _result_components() -> Sequence[Any]:
    verdict_box = gr.HTML(visible=False, elem_id="control-verdict")
    with gr.Row():
        return [
            verdict_box,
            grid_image("Evaluation: map, with it, without, with another map", elem_id="control-sheet"),
            gr.File(
                label="Download",
                visible=False,
                interactive=False,
                file_count="multiple",
                min_width=200,
                elem_id="control-files",
                elem_classes="downloads",
            ),
        ]


def _result_values(job: Job | None) -> Sequence[Any]:
    """Verdict, image grid and files of a job."""
    run = job.run if job else Path()
    grid = open_image(run / "sheet.png") if job else None
    existing = [run / ADAPTER, *run.glob("diffusers/*.*"), *run.glob("controlnext/*.*")] if job else []
    files = copy_for_download(existing, job.title if job else "")
    verdict_text = verdict_html(read_result(job)) if job else ""
    return [
        gr.HTML(verdict_text, visible=bool(verdict_text)),
        gr.Image(value=grid, visible=grid is not None),
        gr.File(value=files or None, visible=bool(files)),
    ]


PAGE = Page("Control", "control", "Generate images that follow a sketch, a photo or a map.", build)
