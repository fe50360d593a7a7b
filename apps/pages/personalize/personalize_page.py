"""Teach a subject or a style from a few photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from veneer import base_models, methods
from veneer.injection import VeneerError
from veneer.training.data.photo_folder import READ
from veneer.training.personalization_config import DEMO

from ...context import Studio, escaped, explained
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, bounded, shown
from ..page import Page
from ..shared.config_form import Field, Slots, fields_of, part_of
from ..shared.dry_run import checked
from ..shared.events import DRAWS, QUIET
from ..shared.example_images import photos
from ..shared.images import gallery
from ..shared.job_view import JobView, Results, job_view, shows
from ..shared.photo_upload import Rows, example, lay_down, look_at
from ..shared.training_result import for_others
from .request import (
    MAIN,
    SETTINGS,
    USUAL,
    Asked,
    base_of,
    estimate,
    lengths,
    main_method,
    method_names,
    options_of,
    usual,
    usual_options,
    words,
)
from .results import KOHYA, parts, shown_results, stamp

KIND = "teach"
SHORT: dict[str, Any] = {"max_length": LIMITS.text, "min_width": 140}
"""Of a field for a word."""
EMPTY = """<div class="empty"><p><strong>No run yet.</strong></p><ol>
<li>Press <em>Example photos</em>, or drop a few photos of one thing and give it a name.</li>
<li>Press <em>Start</em>. Previews come here while it trains; at the end its scores, a verdict and its files.</li>
<li>Press <em>Generate with it</em>, and write prompts with its name.</li></ol></div>"""
NO_PHOTOS = f"Drop 3 to 20 photos of one thing or one style, at most {LIMITS.photos}; or take the example."
FILLED = ("steps", "batch", "learning_rate", "schedule", "seed", "preview_every", "checkpoint_every", "eval_seeds")
"""Settings that a preset fills in."""
UNKNOWN = 512
"""Pixels that photos are looked at with where a base does not say its size."""


def photos_taken(paths: Sequence[str] | None, base: str, captions: Sequence[str] = ()) -> list[Any]:
    """Thumbnails, crops, what is wrong in Markdown, and the table of captions, of photos that were dropped."""
    if not paths:
        return [gr.Gallery([], visible=False), gr.Gallery([], visible=False), NO_PHOTOS, gr.Dataframe([], visible=False)]
    side = base_models.preset(base_of(base)).resolution or UNKNOWN
    found = look_at(paths, side)
    rows = [[name, caption] for name, caption in zip(found.names, [*captions, *[""] * len(found.names)], strict=False)]
    number = f"{len(found.names)} photo{'s' * (len(found.names) != 1)}"
    wrong = "\n".join(f"- ⚠ {escaped(text)}" for text in found.wrong)
    crops = gr.Gallery(found.crops, label=f"As square crops of {side} × {side} pixels, as this base sees them", visible=True)
    thumbs = gr.Gallery(list(zip(found.thumbs, found.names, strict=True)), visible=True)
    said = f"{number}.\n\n{wrong}" if wrong else f"{number}, nothing wrong with them."
    return [thumbs, crops, said, gr.Dataframe(rows, visible=True)]


def example_taken(base: str) -> list[Any]:
    """The example's photos, concept and class word, and what `photos_taken` gives for them."""
    paths, captions = example()
    return [paths, DEMO["concept"], DEMO["class_word"], *photos_taken(paths, base, captions)]


def filled(slots: Slots, preset: str, base: str, method: str) -> list[Any]:
    """Settings by a preset, the chosen method's line, and the form of its options."""
    given = usual(preset, base, method)
    return [*(given[name] for name in FILLED), about(method), *slots.fill(options_of(method), usual_options(base, method))]


def about(method: str) -> str:
    """The line of the method whose options are asked for, in Markdown."""
    line = (methods.get(main_method(method)).__doc__ or "").strip().splitlines()[0]
    return f"**{escaped(main_method(method))}**: {escaped(line)}" + ("" if options_of(method) else " It has no options.")


def agree(filled_for: Sequence[str], now: Sequence[str]) -> None:
    """Settings and options in the form are those of the preset, the base and the method that are chosen now.

    Raises:
        VeneerError: they are still on their way, or there is no such base or method.
    """
    if list(filled_for) != list(now):
        preset, base, method = now
        base_of(base)
        main_method(method)
        raise VeneerError(
            f"the settings for {preset}, {shown(method)} and {shown(base)} are on their way. Press again in a moment.",
            where="settings",
            given=tuple(filled_for),
            expected=tuple(now),
        )


def begin(studio: Studio, workspace: Workspace, paths: Sequence[str] | None, captions: Rows, asked: Asked) -> Job:
    """A job that teaches from these photos.

    Raises:
        VeneerError: no usable photos, no concept, a setting that cannot be, or too many jobs that wait.
    """
    title = f"{shown(bounded(asked.concept, 'concept'))}, {asked.method}"
    words(asked, workspace.given)  # refuse before anything is written
    folder = lay_down(workspace, paths or [], captions)
    return studio.begin(workspace, KIND, title, words(asked, folder))


def build(studio: Studio) -> tuple[JobView, gr.Button]:
    """The page. Gives its jobs, and the button that generates with the chosen one."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            asks = _Asks(studio)
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("### Runs", elem_id="teach-runs")
            view = job_view(studio, KIND, Results(parts, shown_results, stamp), f"{EMPTY}\n\n{photos()}")
    asks.connect(view.choice)

    def kohya(name: str, request: gr.Request) -> Any:
        return gr.File(for_others(studio.workspace(request), name), visible=True)

    view.extra[KOHYA].click(explained(kohya), [view.choice], view.extra[KOHYA + 1], **DRAWS)
    return view, view.extra[-1]


class _Asks:
    """What the page asks for."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.files = gr.File(
            label="Photos", file_count="multiple", file_types=sorted(READ), height=140, elem_id="teach-photos", interactive=True
        )
        self.notes = gr.Markdown(NO_PHOTOS, elem_id="teach-notes")
        self.example = gr.Button("Example photos", size="sm", elem_id="teach-example")
        self.thumbs = gallery("Your photos", 5, visible=False, buttons=[])
        self._name()
        self.preset = gr.Radio(
            lengths("bundled", USUAL), value="quick", label="How long", elem_id="teach-preset",
            info="Longer is usually more similar to the photos.",
        )  # fmt: skip
        with gr.Accordion("Captions and crops", open=False):
            self.captions = gr.Dataframe(
                headers=["photo", "caption"],
                datatype="str",
                type="array",
                label="Captions, if you like: what else is in a photo, with {concept} for its subject",
                static_columns=[0],
                interactive=True,
                visible=False,
                wrap=True,
            )
            self.crops = gallery("Crops", 5, visible=False, buttons=[])
        self._how()

    def _name(self) -> None:
        """What the subject is called."""
        with gr.Row():
            self.concept = gr.Textbox(
                label="Concept", placeholder="<toy>", info="Its trigger token: a new word.", elem_id="teach-concept", **SHORT
            )
            self.word = gr.Textbox(
                label="Class word", placeholder="toy", info="The kind of thing it is.", elem_id="teach-word", **SHORT
            )

    def _how(self) -> None:
        """The method, its settings and options, what they should cost, and the start."""
        with gr.Row():
            self.method = gr.Dropdown(
                method_names(False), value=USUAL, label="Method", allow_custom_value=True, min_width=140, elem_id="teach-method",
                info="pivotal: a token and a LoRA, most similar in a short time. lora: one file for all programs.",
            )  # fmt: skip
            self.base = gr.Textbox("bundled", label="Base", info="bundled, a folder, or a hub name.", **SHORT)
        given = usual("quick", "bundled", USUAL)
        cost = estimate_of(None, "bundled", USUAL, given["steps"], given["batch"], eval_seeds=given["eval_seeds"])
        self.estimate = gr.Markdown(cost, elem_id="teach-estimate")
        self.check = gr.Button("Try one step: what will it take?", size="sm", elem_id="teach-check")
        self.checked = gr.Textbox(label="What a run takes", lines=3, visible=False, interactive=False, elem_id="teach-checked")
        with gr.Accordion("Settings", open=False):
            with gr.Row(elem_classes="options"):
                main = {f.name: part_of(f, given.get(f.name), **_named(f)) for f in SETTINGS if f.name in MAIN}
            with gr.Accordion("More", open=False), gr.Row(elem_classes="options"):
                more = {f.name: part_of(f, given.get(f.name), **_named(f)) for f in SETTINGS if f.name not in MAIN}
            self.settings = {**main, **more}
        with gr.Accordion("Options of the method", open=False):
            self.about = gr.Markdown(about(USUAL))
            with gr.Row(elem_classes="options"):
                forms = [fields_of(methods.get(name)) for name in methods.names()]
                self.slots = Slots.build(forms, options_of(USUAL), usual_options("bundled", USUAL))
        with gr.Row(elem_classes="action"):
            self.start = gr.Button("Start", variant="primary", elem_id="teach-start", min_width=120)

    def connect(self, choice: Any) -> None:
        """Let the parts act; a started job is chosen in `choice`."""
        studio, looked = self.studio, [self.thumbs, self.crops, self.notes, self.captions]
        named = [self.settings[field.name] for field in SETTINGS]

        def wanted(concept: str, word: str, preset: str, base: str, method: str, filled_for: list[str], *rest: Any) -> Asked:
            agree(filled_for, [preset, base, method])
            settings, parts = rest[: len(SETTINGS)], rest[len(SETTINGS) :]
            return Asked(concept, word, base, method, settings, self.slots.given(options_of(method), parts))

        def start(request: gr.Request, paths: Any, rows: Any, *rest: Any) -> Any:
            workspace = studio.workspace(request)
            return shows(workspace, KIND, begin(studio, workspace, paths, rows or [], wanted(*rest)))

        def look_before(request: gr.Request, paths: Any, rows: Any, *rest: Any) -> Any:
            return gr.Textbox(checked(studio.workspace(request), paths, rows or [], wanted(*rest)), visible=True)

        def cost(base: str, method: str, steps: str, batch: str, optimizer: str, images: str, request: gr.Request) -> str:
            return estimate_of(studio.workspace(request), base, method, steps, batch, optimizer, images)

        def durations(base: str, method: str, request: gr.Request) -> Any:
            return lengths_of(studio.workspace(request), base, method)

        def fill(preset: str, base: str, method: str) -> list[Any]:
            return [[preset, base, method], *filled(self.slots, preset, base, method)]

        plain: dict[str, Any] = {"api_visibility": "private"}
        dropped = [self.files.upload, self.files.clear, self.files.delete]
        gr.on(dropped, explained(photos_taken), [self.files, self.base], looked, **plain)
        examples = [self.files, self.concept, self.word, *looked]
        self.example.click(explained(example_taken), [self.base], examples, **plain)
        parts = [self.preset, self.base, self.method]
        filled_for = gr.State(["quick", "bundled", USUAL])
        filling = [filled_for, *(self.settings[name] for name in FILLED), self.about, *self.slots.components]
        gr.on(
            [self.preset.change, self.method.change, self.base.submit, self.base.blur], explained(fill), parts, filling,
            show_progress="hidden", **plain,
        )  # fmt: skip
        gr.on(None, lambda: gr.Dropdown(choices=method_names(True)), None, self.method, show_progress="hidden", **plain)
        costs = [self.base, self.method, *(self.settings[name] for name in ("steps", "batch", "optimizer", "eval_seeds"))]
        gr.on([part.change for part in costs], explained(cost), costs, self.estimate, show_progress="hidden", **plain)
        gr.on(None, explained(cost), costs, self.estimate, **QUIET)
        kinds = [self.base.blur, self.base.submit, self.method.change]
        for when in (None, kinds):
            gr.on(when, explained(durations), [self.base, self.method], self.preset, **QUIET)
        inputs = [self.files, self.captions, self.concept, self.word, *parts, filled_for, *named, *self.slots.components]
        self.start.click(explained(start), inputs, choice, **plain).success(None, js="() => reveal('teach-runs')", **QUIET)
        one: dict[str, Any] = {"concurrency_id": "check", "concurrency_limit": 1, **plain}
        self.check.click(explained(look_before), inputs, self.checked, **one)


def _named(field: Field) -> dict[str, Any]:
    return {"min_width": 200, "elem_id": f"teach-{field.name.replace('_', '-')}"}


def estimate_of(workspace: Workspace | None, *given: str, **more: str) -> str:
    """The estimate in Markdown, see `estimate`, or nothing while the base is not yet one."""
    try:
        return escaped(estimate(workspace, *given, **more))
    except VeneerError:
        return ""


def lengths_of(workspace: Workspace, base: str, method: str) -> Any:
    """The presets with the minutes that they take here; as they are while the base or the method is not yet one."""
    try:
        return gr.Radio(choices=lengths(base, method, workspace))
    except VeneerError:
        return gr.skip()


PAGE = Page("Teach", "teach", "Teach a base a subject or a style from a few photos.", build)
