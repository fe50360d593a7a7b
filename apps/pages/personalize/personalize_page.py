"""Page Train: train a subject or style from a few photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from veneer import methods
from veneer.training.data.photo_folder import READ

from ...base_access import check_download
from ...context import Context, show_errors
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, check_text, printable
from ..page import Page
from ..shared.config_form import Field, Slots, component_of, fields_of
from ..shared.dry_run import dry_run
from ..shared.events import GENERATION, QUIET
from ..shared.html import section, step
from ..shared.images import gallery
from ..shared.job_view import Results, job_view, select_job
from ..shared.photo_upload import Rows
from ..shared.training_result import export_kohya
from ..showcase.showcase import showcase, subject_strip
from .concept_groups import ConceptFields, save_groups
from .config_fields import MoreFields
from .config_files import write_form
from .estimates import estimate_text, preset_radio
from .form_values import PRESET_FIELDS, check_form_is_current, fill_form, method_summary
from .memory import MemoryFields
from .photo_fields import NO_PHOTOS, show_example, show_photos
from .request import (
    DEFAULT_METHOD,
    MAIN,
    SETTINGS,
    PersonalizeRequest,
    command,
    default_options,
    method_names,
    options_of,
    preset_choices,
    preset_settings,
)
from .results import KOHYA, result_components, result_values, stamp

KIND = "train"
SHORT: dict[str, Any] = {"max_length": LIMITS.text, "min_width": 140}
"""Layout of a short text field."""
METHOD_HELP = "pivotal: token embedding and LoRA, most similar. lora: one file for all tools. The page Methods explains all."
EMPTY = "**No run yet.** Progress and previews appear here; then the images before and after, a verdict and the files."


def start_job(
    context: Context, workspace: Workspace, paths: Sequence[str] | None, captions: Rows, request: PersonalizeRequest
) -> Job:
    """Submits a training job on these photos.

    Raises:
        VeneerError: no usable photos, no concept, an invalid setting, or too many queued jobs.
    """
    title = f"{printable(check_text(request.concept, 'concept'))}, {request.method}"
    command(request, workspace.datasets)  # validates before anything is written
    check_download(request.base)
    folder, *more = save_groups(workspace, paths or [], captions, request.groups)
    job = context.submit(workspace, KIND, title, command(request, folder, more))
    write_form(job, request)
    return job


def build(context: Context) -> Any:
    """Builds the page; returns its job view, the button that opens the page Generate, and the cards of the first screen."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            form = _Form(context)
        with gr.Column(scale=1, min_width=320):
            cards = showcase()
            gr.HTML(section("Runs"), elem_id="train-runs")
            results = Results(
                lambda: [*result_components(), cards.column],
                lambda job: [*result_values(job), gr.Column(visible=job is None)],
                stamp,
            )
            view = job_view(context, KIND, results, EMPTY)
    form.connect(view.choice, cards.train)

    def kohya(name: str, request: gr.Request) -> Any:
        return gr.File(export_kohya(context.workspace(request), name), visible=True)

    view.extra[KOHYA].click(show_errors(kohya), [view.choice], view.extra[KOHYA + 1], **GENERATION)
    return view, view.extra[-2], cards


class _Form:
    """Form of the page."""

    def __init__(self, context: Context) -> None:
        self.context = context
        gr.HTML(subject_strip())
        gr.HTML(step(1, "Photos", "3 to 20 of one subject or style"))
        self.files = gr.File(
            label="Photos", file_count="multiple", file_types=sorted(READ), height=120, elem_id="train-photos", interactive=True
        )
        with gr.Row(elem_classes="notes"):
            self.notes = gr.Markdown(NO_PHOTOS, elem_id="train-notes")
            self.example_photos = gr.Button("Example photos", size="sm", scale=0, min_width=140, elem_id="train-example")
        self.thumbs = gallery("Your photos", 5, visible=False, buttons=[])
        with gr.Accordion("Captions and crops", open=False, visible=False, elem_id="train-captions") as self.details:
            self.captions = gr.Dataframe(
                headers=["photo", "caption"],
                datatype="str",
                type="array",
                label="Optional captions: what a photo shows, with {concept} for the subject",
                static_columns=[0],
                interactive=True,
                wrap=True,
            )
            self.crops = gallery("Crops", 5, buttons=[])
        gr.HTML(step(2, "Subject", "the name that prompts use"))
        self._subject()
        gr.HTML(step(3, "Training"))
        self.preset = gr.Radio(
            preset_choices("bundled", DEFAULT_METHOD), value="quick", label="Preset", elem_id="train-preset",
            info="Longer training makes the images more similar to the photos.",
        )  # fmt: skip
        self._method_and_settings()

    def _subject(self) -> None:
        """Name and class of the subject, and of further ones."""
        with gr.Row():
            self.concept = gr.Textbox(
                label="Concept",
                placeholder="<toy>",
                info="Trigger token for prompts: a new name.",
                elem_id="train-concept",
                **SHORT,
            )
            self.word = gr.Textbox(
                label="Class word", placeholder="toy", info="What kind of subject it is.", elem_id="train-word", **SHORT
            )
        self.concepts = ConceptFields()

    def _method_and_settings(self) -> None:
        """Method, its settings and options, the cost estimate, and the start button."""
        with gr.Row():
            self.method = gr.Dropdown(
                method_names(False), value=DEFAULT_METHOD, label="Method", allow_custom_value=True, min_width=140,
                elem_id="train-method", info=METHOD_HELP,
            )  # fmt: skip
            self.base = gr.Textbox("bundled", label="Base model", info="bundled, a folder, or a hub name.", **SHORT)
        settings = preset_settings("quick", "bundled", DEFAULT_METHOD)
        with gr.Accordion("Settings", open=False):
            with gr.Row(elem_classes="options"):
                main = {f.name: component_of(f, settings.get(f.name), **_layout(f)) for f in SETTINGS if f.name in MAIN}
            with gr.Accordion("More settings", open=False), gr.Row(elem_classes="options"):
                more = {f.name: component_of(f, settings.get(f.name), **_layout(f)) for f in SETTINGS if f.name not in MAIN}
            self.settings = {**main, **more}
        with gr.Accordion("Method options", open=False):
            self.about = gr.Markdown(method_summary(DEFAULT_METHOD))
            with gr.Row(elem_classes="options"):
                forms = [fields_of(methods.get(name)) for name in methods.names()]
                self.slots = Slots.build(forms, options_of(DEFAULT_METHOD), default_options("bundled", DEFAULT_METHOD))
        self.more = MoreFields(self.concepts)
        self._cost(settings)
        with gr.Row(elem_classes="action"):
            self.start = gr.Button("Train", variant="primary", elem_id="train-start", min_width=120)

    def _cost(self, settings: dict[str, Any]) -> None:
        """Estimated time and memory, and the buttons that check them."""
        cost = estimate_text(
            None, "bundled", DEFAULT_METHOD, settings["steps"], settings["batch"], eval_seeds=settings["eval_seeds"]
        )
        self.estimate = gr.Markdown(cost, elem_id="train-estimate")
        with gr.Row():
            self.memory_button = gr.Button("Predict memory", size="sm", min_width=140, elem_id="train-memory")
            self.check = gr.Button("Try one step", size="sm", min_width=140, elem_id="train-check")
        self.memory = MemoryFields(self.memory_button)
        self.dry_run = gr.Textbox(label="Check of this run", lines=3, visible=False, interactive=False, elem_id="train-checked")

    def connect(self, choice: Any, try_button: gr.Button) -> None:
        """Connects the events; a started job is selected in `choice`. `try_button` trains on the example photos."""
        context, photo_outputs = self.context, [self.thumbs, self.crops, self.notes, self.details, self.captions]
        setting_components = [self.settings[field.name] for field in SETTINGS]

        def read_form(
            workspace: Workspace, concept: str, word: str, preset: str, base: str, method: str, filled_for: list[str], *rest: Any
        ) -> PersonalizeRequest:
            check_form_is_current(filled_for, [preset, base, method])
            settings, parts = rest[: len(SETTINGS)], rest[len(SETTINGS) :]
            options = self.slots.entries(options_of(method), parts)
            more = self.more.read(workspace, parts[len(self.slots.components) :])
            return PersonalizeRequest(concept, word, base, method, settings, options, *more)

        def start(request: gr.Request, paths: Any, rows: Any, *rest: Any) -> Any:
            workspace = context.workspace(request)
            return select_job(workspace, KIND, start_job(context, workspace, paths, rows or [], read_form(workspace, *rest)))

        def try_step(request: gr.Request, paths: Any, rows: Any, *rest: Any) -> Any:
            workspace = context.workspace(request)
            return gr.Textbox(dry_run(workspace, paths, rows or [], read_form(workspace, *rest)), visible=True)

        def cost(base: str, method: str, steps: str, batch: str, optimizer: str, images: str, request: gr.Request) -> str:
            return estimate_text(context.workspace(request), base, method, steps, batch, optimizer, images)

        def preset_labels(base: str, method: str, request: gr.Request) -> Any:
            return preset_radio(context.workspace(request), base, method)

        def fill(preset: str, base: str, method: str, filled_for: list[str]) -> list[Any]:
            if filled_for == [preset, base, method]:  # such as after a config file
                return [gr.skip()] * len(form_outputs)
            return [[preset, base, method], *fill_form(self.slots, preset, base, method)]

        hidden_api: dict[str, Any] = {"api_visibility": "private"}
        photo_events = [self.files.upload, self.files.clear, self.files.delete]
        gr.on(photo_events, show_errors(show_photos), [self.files, self.base], photo_outputs, **hidden_api)
        examples = [self.files, self.concept, self.word, *photo_outputs]
        self.example_photos.click(show_errors(show_example), [self.base], examples, **hidden_api)
        parts = [self.preset, self.base, self.method]
        filled_for = gr.State(["quick", "bundled", DEFAULT_METHOD])
        form_outputs = [filled_for, *(self.settings[name] for name in PRESET_FIELDS), self.about, *self.slots.components]
        gr.on(
            [self.preset.change, self.method.change, self.base.submit, self.base.blur], show_errors(fill), [*parts, filled_for],
            form_outputs, show_progress="hidden", **hidden_api,
        )  # fmt: skip
        base_changes = [self.base.blur, self.base.submit]
        for when in (None, base_changes):
            gr.on(when, show_errors(method_choices), self.base, self.method, show_progress="hidden", **hidden_api)
        costs = [self.base, self.method, *(self.settings[name] for name in ("steps", "batch", "optimizer", "eval_seeds"))]
        gr.on([part.change for part in costs], show_errors(cost), costs, self.estimate, show_progress="hidden", **hidden_api)
        gr.on(None, show_errors(cost), costs, self.estimate, **QUIET)
        for when in (None, [*base_changes, self.method.change]):
            gr.on(when, show_errors(preset_labels), [self.base, self.method], self.preset, **QUIET)
        subject = [self.files, self.captions, self.concept, self.word]
        inputs = [*subject, *parts, filled_for, *setting_components, *self.slots.components, *self.more.components]
        options = [self.about, *self.slots.components, *self.more.components]
        filled = [self.concept, self.word, self.base, self.method, filled_for, *setting_components, *options]
        self.more.connect(context, read_form, inputs[2:], filled, self.slots)
        self.memory.connect(context, read_form, inputs[2:], self.settings)
        self.start.click(show_errors(start), inputs, choice, **hidden_api).success(None, js="() => reveal('train-runs')", **QUIET)
        example = try_button.click(show_errors(show_example), [self.base], examples, **hidden_api)
        example.success(show_errors(start), inputs, choice, **hidden_api).success(None, js="() => reveal('train-runs')", **QUIET)
        single: dict[str, Any] = {"concurrency_id": "check", "concurrency_limit": 1, **hidden_api}
        self.check.click(show_errors(try_step), inputs, self.dry_run, **single)


def method_choices(base: str) -> Any:
    """Update of the method field: the methods for a base model."""
    return gr.Dropdown(choices=method_names(True, base))


def _layout(field: Field) -> dict[str, Any]:
    return {"min_width": 200, "elem_id": f"train-{field.name.replace('_', '-')}"}


PAGE = Page("Train", "train", "", build)
