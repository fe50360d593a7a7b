"""Page Generate: generate with several adapters, compare with the base model, and sweep the strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from veneer import base_models
from veneer.injection import StateError

from ...context import Context, escape_markup, show_errors
from ...image_store import store_images
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, printable
from ..page import Page
from ..shared.adapter_lists import fixed_adapters, refresh_on_change
from ..shared.events import GENERATION, QUIET
from ..shared.generation_fields import Fields, fields, values
from ..shared.generation_request import MAX_STRENGTH, GenerationRequest, defaults, parse_request
from ..shared.images import gallery, photo_input
from ..shared.job_view import ADAPTER
from ..shared.trigger_tokens import find_missing
from ..shared.verdict import read_result
from ..showcase.showcase import prompt_examples
from .generation import MODES, generate, read_image_settings, text_adapters

EXAMPLES = 4


def build(context: Context) -> GenerateForm:
    """Builds the page."""
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("Try an example, or write a prompt:")
            with gr.Row():
                preset = base_models.preset("bundled").unrelated[:EXAMPLES]
                examples = [(text, gr.Button(text, size="sm", min_width=130)) for text in preset]
            parts: list[Any] = []
            fields_ = fields("generate", below=lambda: parts.extend(_adapters()))
            choice, rows, mode = parts
            with gr.Row(elem_classes="action"):
                go = gr.Button("Generate", variant="primary", scale=3, min_width=130, elem_id="generate-draw")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="generate-stop")
        with gr.Column(min_width=300):
            state = gr.Markdown("No image yet. Write a prompt and press *Generate*, or try an example.", elem_id="generate-state")
            pointer = _pointer()
            examples_shown = gr.HTML(prompt_examples(), elem_id="generate-examples")
            pictures = gallery("Images", 2, buttons=["download", "fullscreen"], elem_id="generate-gallery")
            reuse = gr.Button("Reuse the settings of the selected image", size="sm", visible=False, elem_id="generate-again")
            with gr.Accordion("Reuse the settings of an image file", open=False):
                upload = photo_input("A PNG that was generated here", height=180, elem_id="generate-brought")
    paths_state, chosen = gr.State(list[str]()), gr.State(0)
    buttons = [(go, None), *((button, text) for text, button in examples)]
    paths_state.change(lambda paths: gr.HTML(visible=not paths), [paths_state], [examples_shown], **QUIET)
    _wire(context, fields_, (choice, rows), mode, buttons, stop, (pictures, state, paths_state), pointer)
    _wire_settings(context, fields_, (choice, rows), (pictures, reuse, upload), (state, paths_state, chosen))
    return GenerateForm([*fields_.all(), choice, *rows, state])


@dataclass(frozen=True)
class GenerateForm:
    """Components that another page fills in, see `form_for_job`."""

    outputs: list[Any]


def form_for_job(workspace: Workspace, job: Job) -> list[Any]:
    """Values of `GenerateForm.outputs` for the adapter of a job: its base model, a prompt with its token, and the adapters.

    The adapters that it was trained on top of are selected with it, at the same strengths.

    Raises:
        VeneerError: the job has no adapter.
    """
    name = next((name for name, file in workspace.all_adapters().items() if file == job.run / ADAPTER), None)
    if name is None:
        message = "this run has no adapter yet. Wait for its end, or stop it to save the trained weights."
        raise StateError(message, where=job.name, given=job.state)
    config = read_result(job).get("config") or {}
    flags = dict(word[2:].split("=", 1) for word in job.command if word.startswith("--") and "=" in word)
    base, concept = (str(config.get(key) or flags.get(key) or "") for key in ("base", "concept"))
    preset = base_models.preset(base or "bundled")
    prompt = next(iter(preset.previews or preset.templates), "a {concept}").replace("{concept}", concept)
    steps, guidance, negative, side = defaults(base)
    generation = GenerationRequest(base or "bundled", prompt, negative, 0, steps, guidance, (side, side) if side else None, 4)
    choices = text_adapters(workspace)
    strength_of = {**{each: value for each, value in fixed_adapters(workspace, job).items() if each in choices}, name: 1.0}
    sliders = [gr.Slider(value=value, visible=True, label=f"Strength of {each}") for each, value in strength_of.items()]
    sliders += [gr.Slider(visible=False)] * (LIMITS.adapters - len(strength_of))
    note = f"**{escape_markup(printable(name))}** is selected, and its token is in the prompt: press *Generate*."
    return [
        *values(generation),
        gr.Dropdown(choices=choices, value=[*strength_of], multiselect=True),
        *sliders,
        note,
    ]


def form_for_image(workspace: Workspace, path: str | None) -> list[Any]:
    """Values of `GenerateForm.outputs` for the settings saved in an image.

    Raises:
        VeneerError: not an image with settings, see `read_image_settings`.
    """
    generation, strength_of, note = read_image_settings(workspace, path)
    choices = text_adapters(workspace)
    if control := [name for name in strength_of if name not in choices]:
        names = ", ".join(map(escape_markup, control))
        note = f"{note} Made on the page *Control* with {names}, whose map is not part of the settings."
    strength_of = {name: strength for name, strength in strength_of.items() if name in choices}
    strengths = [gr.Slider(value=s, visible=True, label=f"Strength of {n}") for n, s in strength_of.items()]
    hidden = [gr.Slider(visible=False)] * (LIMITS.adapters - len(strengths))
    dropdown = gr.Dropdown(choices=choices, value=list(strength_of), multiselect=True)
    return [*values(generation), dropdown, *strengths, *hidden, note]


def connect_runs(context: Context, tabs: gr.Tabs, built: Mapping[str, Any]) -> None:
    """Connects the button of a finished run to this page.

    Args:
        built: return values of the pages by slug: a `GenerateForm` for this page, a `JobView`, a button and more for Train.
    """

    def open_with(request: gr.Request, name: str | None) -> list[Any]:
        workspace = context.workspace(request)
        return [gr.Tabs(selected=PAGE.slug), *form_for_job(workspace, workspace.job(str(name)))]

    view, button, *_ = built["train"]
    form: GenerateForm = built[PAGE.slug]
    button.click(show_errors(open_with), [view.choice], [tabs, *form.outputs], **QUIET)


def _pointer() -> list[Any]:
    """Buttons for a prompt whose trigger token has no selected adapter, and the adapters that the first one selects."""
    with gr.Row(visible=False) as row:
        use = gr.Button("Select it and generate", variant="primary", size="sm", min_width=160, elem_id="generate-use")
        anyway = gr.Button("Generate without it", size="sm", min_width=160, elem_id="generate-anyway")
    return [row, use, anyway, gr.State(list[str]())]


def _adapters() -> tuple[gr.Dropdown, list[gr.Slider], gr.Radio]:
    """Dropdown of adapters, a strength slider for each selected one, and the comparison mode."""
    choice = gr.Dropdown(
        [], value=[], multiselect=True, max_choices=LIMITS.adapters, label="Adapters", elem_id="generate-adapters",
        info="Trained or uploaded; several can be combined. Empty: the base model alone.",
    )  # fmt: skip
    rows = [
        gr.Slider(
            -MAX_STRENGTH, MAX_STRENGTH, value=1.0, step=0.05, label=f"Strength {i + 1}", visible=False, elem_id=f"generate-s{i}"
        )
        for i in range(LIMITS.adapters)
    ]
    mode = gr.Radio(list(MODES.items()), value="with", label="Compare", elem_id="generate-way")
    return choice, rows, mode


def _wire(
    context: Context, fields_: Fields, adapters: Any, mode: gr.Radio, buttons: Any, stop: gr.Button, parts: Any, pointer: Any
) -> None:
    """Connects generation and the list of adapters."""
    choice, rows = adapters
    row, use, anyway, missing_adapters = pointer
    inputs, outputs = [*fields_.all(), choice, mode, *rows], [*parts, row, missing_adapters]
    count = len(fields_.all())

    def run(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        """Generates, unless a trigger token's adapter is not selected: then shows the choice."""
        workspace = context.workspace(request)
        absent = find_missing(workspace, str(given[1] or ""), given[count] or [], text_adapters(workspace))
        if absent.known:
            yield [gr.skip(), absent.describe(), gr.skip(), gr.Row(visible=True), absent.adapters]
            return
        for items in run_anyway(request, *given):
            yield [items[0], f"{items[1]}\n\n{absent.describe()}".strip(), *items[2:]]

    def run_anyway(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        names, mode, strengths = given[count] or [], given[count + 1], given[count + 2 :]
        workspace = context.workspace(request)
        updates = generate(context, workspace, parse_request(*given[:count]), names, strengths, mode)
        for items, progress in store_images(workspace, updates):
            yield [items, progress, [path for path, _ in items], gr.Row(visible=False), []]

    def select_missing(request: gr.Request, names: list[str] | None, more: list[str]) -> Any:
        return gr.Dropdown(choices=text_adapters(context.workspace(request)), value=[*(names or []), *more], multiselect=True)

    events = [fields_.prompt.submit(show_errors(run), inputs, outputs, **GENERATION)]
    selected = use.click(show_errors(select_missing), [choice, missing_adapters], [choice], **QUIET)
    events.append(selected.then(show_errors(run), inputs, outputs, **GENERATION))
    events.append(anyway.click(show_errors(run_anyway), inputs, outputs, **GENERATION))
    for button, text in buttons:
        event = button.click
        if text is not None:
            event = button.click(lambda text=text: text, None, [fields_.prompt], **QUIET).then
        events.append(event(show_errors(run), inputs, outputs, **GENERATION))
    stop.click(None, cancels=events, **QUIET)
    refresh_on_change(context, [choice], lambda workspace, _: [gr.Dropdown(choices=text_adapters(workspace))], choice)
    choice.change(strength_sliders, [choice], rows, **QUIET)


def strength_sliders(names: list[str] | None) -> list[Any]:
    """A labeled strength slider for each selected adapter."""
    known = list(names or [])[: LIMITS.adapters]
    labels = [f"Strength of {name}" for name in known] + [""] * (LIMITS.adapters - len(known))
    return [gr.Slider(visible=bool(label), label=label) for label in labels]


def _wire_settings(context: Context, fields_: Fields, adapters: Any, parts: Any, states: Any) -> None:
    """Connects reuse of settings from the gallery or from an uploaded image."""
    (choice, rows), (pictures, reuse, upload), (state, paths_state, chosen) = adapters, parts, states
    outputs = [*fields_.all(), choice, *rows, state]

    def fill_settings(request: gr.Request, path: str | None) -> list[Any]:
        return form_for_image(context.workspace(request), path)

    def from_gallery(request: gr.Request, paths: list[str], index: int) -> list[Any]:
        return fill_settings(request, paths[index] if 0 <= index < len(paths) else None)

    def pick(event: gr.SelectData) -> int:
        return int(event.index)

    paths_state.change(lambda paths: [gr.Button(visible=bool(paths)), 0], [paths_state], [reuse, chosen], **QUIET)
    pictures.select(pick, None, [chosen], **QUIET)
    reuse.click(show_errors(from_gallery), [paths_state, chosen], outputs, **QUIET)
    upload.upload(show_errors(fill_settings), [upload], outputs, **QUIET)


PAGE = Page("Generate", "generate", "", build)
