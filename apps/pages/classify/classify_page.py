"""Page Classify: train an image classifier, evaluate it, and try it on an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ...classifier_cache import ClassifierCache
from ...context import Context, escape_markup, show_errors
from ...jobs import Job
from ...limits import LIMITS
from ...uploads import load_image
from ...workspace import Workspace
from ..methods.availability import classifier_methods
from ..page import Page
from ..shared.example_images import digits
from ..shared.html import step
from ..shared.job_view import JobView, Results, job_view, select_job
from .label_tables import ABOUT
from .labeled_data import DIGITS, FOLDER, KIND, MULTI_LABEL, SOURCES, ZIP
from .request import AUGMENT, DEFAULTS, ClassifyRequest, submit_jobs
from .results import CLASSIFIER_FILES, result_components, result_values, stamp

MODELS = [("Bundled classifier: fast, works offline", "bundled"), ("Bundled CLIP: also uses the class names", "bundled_clip")]
DEFAULT_METHODS = ["linear_probe", "lora"]
EMPTY = "**No run yet.** Press *Train* above; the built-in digits need no upload."
MODEL_HELP = "Or a name such as timm:vit_small_patch16_224 or open_clip:ViT-B-32/openai (downloaded once)."
METHOD_HELP = (
    "linear_probe trains only a new last layer (fastest); lora adds low-rank weight updates (often better); full trains all "
    "parameters (slow, large file). The page Methods explains all. Each method is a separate run; methods joined by + are "
    "trained together."
)

OPTIONS_HELP = "METHOD.OPTION=VALUE, separated by spaces; the page Methods has the options of each method."
ZIP_LABELS = {False: "Zip with a folder of images for each class", True: "Zip of images with a table labels.csv"}
FOLDER_HELP = {False: "It holds a folder of images for each class.", True: "It holds labels.csv; or a path of a table."}
PREDICTED = {False: "Predicted classes", True: "Probability of each label; labels with 50 % or more are predicted"}


def build(context: Context) -> JobView:
    """Builds the page; returns the view of its runs."""
    classifiers = ClassifierCache()
    with gr.Column():  # keeps the main button in view within the form
        with gr.Row():
            with gr.Column(min_width=300):
                gr.HTML(step(1, "Images", "labeled by folder or by a table"))
                source, file, folder, multi_label, sample = _data_fields()
            with gr.Column(min_width=300):
                gr.HTML(step(2, "Model and methods"))
                model = gr.Dropdown(MODELS, value=DEFAULTS.model, label="Model", info=MODEL_HELP, allow_custom_value=True)
                methods = gr.Dropdown(
                    classifier_methods(DEFAULTS.model), value=DEFAULT_METHODS, multiselect=True, allow_custom_value=True,
                    label="Methods", info=METHOD_HELP, elem_id="classify-methods",
                )  # fmt: skip
                epochs = gr.Slider(1, 100, DEFAULTS.epochs, step=1, label="Epochs", info="Passes over the training images.")
        *more, options = _settings()
        with gr.Row(elem_classes="action"):
            start = gr.Button("Train", variant="primary", elem_id="classify-start")
    view = job_view(context, KIND, Results(lambda: result_components(_trial), _view_values, stamp), EMPTY)
    _wire_trial(context, classifiers, view)

    def handle_start(request: gr.Request, *inputs: Any) -> Any:
        return start_jobs(context, context.workspace(request), ClassifyRequest(*inputs))

    def sources(request: gr.Request) -> Any:
        return gr.Radio(choices=source_choices(context.workspace(request)))

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on(None, show_errors(sources), None, source, queue=False, **private)
    source.change(source_fields, source, [file, folder, multi_label, sample], queue=False, **private)
    multi_label.change(label_fields, multi_label, [file, folder], queue=False, **private)
    model.change(show_errors(supported_methods), [model, methods], methods, queue=False, **private)
    inputs = [source, file, folder, view.choice, model, methods, epochs, *more, multi_label, options]
    start.click(show_errors(handle_start), inputs, view.choice, api_visibility="private")
    return view


def _data_fields() -> tuple[gr.Radio, gr.File, gr.Textbox, gr.Checkbox, gr.HTML]:
    """Fields for the source of the images, and a sample of the built-in digits."""
    source = gr.Radio([(label, name) for name, label in SOURCES.items()], value=DIGITS, label="Images", elem_id="classify-source")
    file = gr.File(
        label=ZIP_LABELS[False],
        file_types=[".zip"],
        visible=False,
        elem_id="classify-zip",
        height=140,
    )
    folder = gr.Textbox(
        label="Folder", info=FOLDER_HELP[False], placeholder="/home/me/pets", visible=False,
        max_length=LIMITS.text, elem_id="classify-folder",
    )  # fmt: skip
    multi_label = gr.Checkbox(False, label="Several labels per image", info=ABOUT, visible=False, elem_id="classify-several")
    return source, file, folder, multi_label, gr.HTML(digits(), label="Sample", elem_id="classify-sample")


def _settings() -> list[Any]:
    """Optional settings, in the order of `ClassifyRequest`; the last are the options of the methods."""
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            shots = gr.Number(
                0, precision=0, minimum=0, label="Images per class", info="For training; 0 uses all.", min_width=140
            )
            size = gr.Number(
                0, precision=0, minimum=0, label="Size in pixels", info="0 uses the default of the model.", min_width=140
            )
            batch = gr.Number(DEFAULTS.batch, precision=0, minimum=1, label="Batch size", info="Images per step.", min_width=140)
        with gr.Row():
            rate = gr.Number(0, minimum=0, label="Learning rate", info="0 uses the default of the method.", min_width=140)
            augment = gr.Dropdown(
                [(label, name) for name, label in AUGMENT.items()], value=DEFAULTS.augment, label="Augmentation", min_width=140,
                info="Digits are never flipped.",
            )  # fmt: skip
            patience = gr.Number(
                0, precision=0, minimum=0, label="Patience",
                info="Epochs without improvement before early stopping; 0 disables it.", min_width=140,
            )  # fmt: skip
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="Of the split and the training.", min_width=140)
        options = gr.Textbox(
            label="Method options", info=OPTIONS_HELP, placeholder="lora.rank=16 vpt.tokens=20", max_length=LIMITS.config_text,
            elem_id="classify-options",
        )  # fmt: skip
    return [shots, size, batch, rate, augment, patience, seed, options]


def _trial() -> list[Any]:
    """Components for classifying an uploaded image."""
    with gr.Accordion("Try it on an image", open=True, visible=False, elem_id="classify-trial") as trial, gr.Row():
        with gr.Column(min_width=280):
            image = gr.Image(
                label="Image to classify", type="filepath", sources=["upload", "webcam", "clipboard"], height=280, buttons=[],
                elem_id="classify-image",
            )  # fmt: skip
            button = gr.Button("Classify", variant="primary", min_width=120, elem_id="classify-ask")
        label = gr.Label(label=PREDICTED[False], min_width=280, elem_id="classify-answer")
    return [trial, image, button, label]


def _view_values(job: Job | None) -> list[Any]:
    ready = job is not None and all((job.run / name).exists() for name in CLASSIFIER_FILES)
    accuracy_text, *rest = result_values(job)
    label = gr.Label(label=PREDICTED[job is not None and MULTI_LABEL in job.command])
    return [accuracy_text, gr.Accordion(visible=ready), gr.skip(), gr.skip(), label, *rest]


def _wire_trial(context: Context, classifiers: ClassifierCache, view: JobView) -> None:
    """Connects classification of an uploaded image by the selected run."""
    _, _, image, button, label, *_ = view.extra

    def handle_classify(name: str | None, path: str | None, request: gr.Request) -> Any:
        return classify(context.workspace(request), classifiers, name, path)

    one: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "ask", "concurrency_limit": 1}
    gr.on([image.change, button.click], show_errors(handle_classify), [view.choice, image], label, **one)
    view.choice.change(lambda: None, None, label, queue=False, api_visibility="private", show_progress="hidden")


def start_jobs(context: Context, workspace: Workspace, request: ClassifyRequest) -> Any:
    """Submits the jobs; returns the update that selects the first one."""
    jobs, left_out = submit_jobs(context, workspace, request)
    if left_out:
        gr.Warning("Left out of the zip: " + escape_markup("; ".join(left_out)), duration=None)
    if len(jobs) > 1:
        gr.Info(f"{len(jobs)} runs were queued. Choose one in the list “Run”.")
    return select_job(workspace, KIND, jobs[0])


def classify(workspace: Workspace, classifiers: ClassifierCache, name: str | None, path: str | None) -> dict[str, float] | None:
    """Predicted classes of an uploaded image; None without an image.

    Raises:
        VeneerError: unknown job, a job without trained weights, or an unreadable image.
    """
    if not path:
        return None
    load_image(path)
    return classifiers.classify(workspace.job(str(name)).run, Path(path))


def source_choices(workspace: Workspace) -> list[tuple[str, str]]:
    """Image sources available to this user."""
    return [(label, name) for name, label in SOURCES.items() if name != FOLDER or workspace.user is None]


def source_fields(source: str) -> tuple[Any, Any, Any, Any]:
    """Updates that show the zip field, the folder field, the checkbox of both, or the sample of digits."""
    fields = gr.File(visible=source == ZIP), gr.Textbox(visible=source == FOLDER), gr.Checkbox(visible=source in (ZIP, FOLDER))
    return *fields, gr.HTML(visible=source == DIGITS)


def label_fields(multi_label: bool) -> tuple[Any, Any]:
    """Updates of the zip field and the folder field: where the labels of the images are."""
    return gr.File(label=ZIP_LABELS[bool(multi_label)]), gr.Textbox(info=FOLDER_HELP[bool(multi_label)])


def supported_methods(model: str, methods: list[str]) -> Any:
    """Update of the method field: the methods that the model supports; unsupported selections are removed."""
    known = classifier_methods(model or DEFAULTS.model)
    selected = [name for name in methods or [] if all(part in known for part in name.split("+"))]
    return gr.Dropdown(choices=known, value=selected, allow_custom_value=True)


PAGE = Page("Classify", "classify", "Train an image classifier, evaluate it, and try it on an image.", build)
