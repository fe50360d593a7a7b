"""Train a classifier of images, evaluate it, and try it on an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from veneer.classification.models.compatibility import compatible_methods

from ...classifier_cache import Answers
from ...context import Studio, escaped, explained
from ...jobs import Job
from ...limits import LIMITS
from ...uploads import picture
from ...workspace import Workspace
from ..page import Page
from ..shared.example_images import digits
from ..shared.job_view import JobView, Results, job_view, shows
from .request import AUGMENT, DIGITS, FOLDER, KIND, SOURCES, USUAL, ZIP, Wanted, begin
from .results import ASKED, parts, stamp, values

MODELS = [("Bundled: quick, works offline", "bundled"), ("Bundled CLIP: reads the class names too", "bundled_clip")]
FIRST = ["linear_probe", "lora"]
EMPTY = "**No run yet.** Press *Train* above: the built-in digits need no images of yours."
NAMES = "Or a name such as timm:vit_small_patch16_224 or open_clip:ViT-B-32/openai, which is downloaded once."
HINTS = (
    "linear_probe trains a new last layer only: quickest. lora adds small weight updates: usually better. full trains "
    "everything: slow, a large file. Each method is a run; two joined by + are trained together."
)


def build(studio: Studio) -> None:
    """The page."""
    answers = Answers()
    with gr.Row():
        with gr.Column(min_width=300):
            source, file, folder, sample = _pictures()
        with gr.Column(min_width=300):
            model = gr.Dropdown(MODELS, value=USUAL.model, label="Model", info=NAMES, allow_custom_value=True)
            methods = gr.Dropdown(
                compatible_methods(USUAL.model), value=FIRST, multiselect=True, allow_custom_value=True, label="Methods",
                info=HINTS, elem_id="classify-methods",
            )  # fmt: skip
            epochs = gr.Slider(1, 100, USUAL.epochs, step=1, label="Epochs", info="Passes over the training images.")
    more = _settings()
    start = gr.Button("Train", variant="primary", elem_id="classify-start")
    view = job_view(studio, KIND, Results(lambda: parts(_trial), _values, stamp), EMPTY)
    _wire_trial(studio, answers, view)

    def to_begin(request: gr.Request, *given: Any) -> Any:
        return start_jobs(studio, studio.workspace(request), Wanted(*given))

    def sources(request: gr.Request) -> Any:
        return gr.Radio(choices=offers(studio.workspace(request)))

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on(None, explained(sources), None, source, queue=False, **private)
    source.change(places, source, [file, folder, sample], queue=False, **private)
    model.change(explained(fitting), [model, methods], methods, queue=False, **private)
    given = [source, file, folder, view.choice, model, methods, epochs, *more]
    start.click(explained(to_begin), given, view.choice, api_visibility="private")


def _pictures() -> tuple[gr.Radio, gr.File, gr.Textbox, gr.HTML]:
    """Where the images come from, and a sample of the built-in ones."""
    source = gr.Radio([(label, name) for name, label in SOURCES.items()], value=DIGITS, label="Images", elem_id="classify-source")
    file = gr.File(
        label="Zip with a folder of images for each class",
        file_types=[".zip"],
        visible=False,
        elem_id="classify-zip",
        height=140,
    )
    folder = gr.Textbox(
        label="Folder", info="It holds a folder of images for each class.", placeholder="/home/me/pets", visible=False,
        max_length=LIMITS.text, elem_id="classify-folder",
    )  # fmt: skip
    return source, file, folder, gr.HTML(digits(), label="Sample", elem_id="classify-sample")


def _settings() -> list[Any]:
    """Settings that have defaults, in the order of `Wanted`."""
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            shots = gr.Number(0, precision=0, minimum=0, label="Images per class", info="For training; 0: all.", min_width=140)
            size = gr.Number(0, precision=0, minimum=0, label="Size in pixels", info="0: the model's default.", min_width=140)
            batch = gr.Number(USUAL.batch, precision=0, minimum=1, label="Batch size", info="Images per step.", min_width=140)
        with gr.Row():
            rate = gr.Number(0, minimum=0, label="Learning rate", info="0: the method's default.", min_width=140)
            augment = gr.Dropdown(
                [(label, name) for name, label in AUGMENT.items()], value=USUAL.augment, label="Augmentation", min_width=140,
                info="Digits are never flipped.",
            )  # fmt: skip
            patience = gr.Number(
                0, precision=0, minimum=0, label="Patience", info="Epochs without improvement before it ends; 0: never.",
                min_width=140,
            )  # fmt: skip
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="Of the split and the training.", min_width=140)
    return [shots, size, batch, rate, augment, patience, seed]


def _trial() -> list[Any]:
    """Where an image is tried on a classifier."""
    with gr.Accordion("Try it on an image", open=True, visible=False, elem_id="classify-trial") as trial, gr.Row():
        with gr.Column(min_width=280):
            image = gr.Image(
                label="An image to classify", type="filepath", sources=["upload", "webcam", "clipboard"], height=280, buttons=[],
                elem_id="classify-image",
            )  # fmt: skip
            again = gr.Button("Classify it", variant="primary", min_width=120, elem_id="classify-ask")
        label = gr.Label(label="Classes with probabilities", min_width=280, elem_id="classify-answer")
    return [trial, image, again, label]


def _values(job: Job | None) -> list[Any]:
    ready = job is not None and all((job.run / name).exists() for name in ASKED)
    words, *rest = values(job)
    return [words, gr.Accordion(visible=ready), gr.skip(), gr.skip(), gr.skip(), *rest]


def _wire_trial(studio: Studio, answers: Answers, view: JobView) -> None:
    """Answers of the chosen run's classifier to the visitor's image."""
    _, _, image, again, label, *_ = view.extra

    def asked(name: str | None, path: str | None, request: gr.Request) -> Any:
        return ask(studio.workspace(request), answers, name, path)

    one: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "ask", "concurrency_limit": 1}
    gr.on([image.change, again.click], explained(asked), [view.choice, image], label, **one)
    view.choice.change(lambda: None, None, label, queue=False, api_visibility="private", show_progress="hidden")


def start_jobs(studio: Studio, workspace: Workspace, wanted: Wanted) -> Any:
    """Begin what is wanted; the list of jobs with the first of them chosen."""
    jobs, left_out = begin(studio, workspace, wanted)
    if left_out:
        gr.Warning("Left out of the zip: " + escaped("; ".join(left_out)), duration=None)
    if len(jobs) > 1:
        gr.Info(f"{len(jobs)} runs, one after the other: choose one in the list “Job”.")
    return shows(workspace, KIND, jobs[0])


def ask(workspace: Workspace, answers: Answers, name: str | None, path: str | None) -> dict[str, float] | None:
    """The classes that the job's classifier gives a visitor's picture; None where there is none.

    Raises:
        VeneerError: no such job, one that has learnt nothing yet, or no picture that can be read.
    """
    if not path:
        return None
    picture(path)
    return answers.ask(workspace.job(str(name)).run, Path(path))


def offers(workspace: Workspace) -> list[tuple[str, str]]:
    """Where this visitor's pictures can come from."""
    return [(label, name) for name, label in SOURCES.items() if name != FOLDER or workspace.user is None]


def places(source: str) -> tuple[Any, Any, Any]:
    """The fields for a zip and a folder and the sample of the digits, of which one is visible."""
    return gr.File(visible=source == ZIP), gr.Textbox(visible=source == FOLDER), gr.HTML(visible=source == DIGITS)


def fitting(model: str, methods: list[str]) -> Any:
    """The methods for a model, and of the chosen ones those that it can be taught by."""
    known = compatible_methods(model or USUAL.model)
    kept = [name for name in methods or [] if all(part in known for part in name.split("+"))]
    return gr.Dropdown(choices=known, value=kept, allow_custom_value=True)


PAGE = Page("Classify", "classify", "Train a classifier of images, evaluate it, and try it on an image.", build)
