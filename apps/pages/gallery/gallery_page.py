"""Page Gallery: everything the user has made, with settings, download and reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...context import Context, show_errors
from ...image_store import ImageStore
from ...jobs import Job
from ...limits import LIMITS
from ...watching import watch
from ...workspace import Workspace
from ..generate.generate_page import form_for_image
from ..page import Page
from ..shared.events import QUIET
from ..shared.html import section
from ..shared.images import gallery
from ..shared.job_view import copy_for_download, open_image, select_job
from .entries import describe_image, finished_runs, run_thumbnails, thumbnails

PER_PAGE = 24
"""Images of a page."""
NO_IMAGES = "No image yet. Images are kept here with their prompt, seed and adapters."
ABOUT = "From the pages Generate and Control. Select one for its settings, to download it or to use it again."
NO_RUNS = "No finished run yet."
CONFIRM_DELETE = """(name, page) => { if (!confirm("Delete this image?")) throw new Error("kept"); return [name, page] }"""


@dataclass(frozen=True)
class GalleryView:
    """Components that other pages are connected to.

    Args:
        selected: name of the selected image. `again`: button that fills the page Generate.
        runs: gallery of runs. `run_names`: their kinds and names.
    """

    selected: gr.State
    again: gr.Button
    runs: gr.Gallery
    run_names: gr.State


def show_page(workspace: Workspace, number: int) -> list[Any]:
    """Values of a page of images: thumbnails, names, page number, position, and the two buttons."""
    store = ImageStore.of(workspace)
    files, number, pages = store.page(number, PER_PAGE)
    total, first = len(store.files()), number * PER_PAGE
    position = (
        f"{first + 1} to {first + len(files)} of {total}; at most {LIMITS.gallery_images} are kept." if files else NO_IMAGES
    )
    return [
        gr.Gallery(thumbnails(files), visible=bool(files)),
        [file.name for file in files],
        number,
        position,
        gr.Button(visible=pages > 1, interactive=number > 0),
        gr.Button(visible=pages > 1, interactive=number + 1 < pages),
    ]


def show_image(workspace: Workspace, name: str) -> list[Any]:
    """Values of the details of an image: image, settings, file, visibility, and name.

    Raises:
        VeneerError: the user has no image of that name.
    """
    file = ImageStore.of(workspace).find(name)
    [copy] = copy_for_download([file])
    return [open_image(file), describe_image(file), gr.DownloadButton(value=copy), gr.Column(visible=True), name]


def build(context: Context) -> GalleryView:
    """Builds the page."""
    gr.HTML(section("Images", ABOUT))
    position = gr.Markdown(NO_IMAGES, elem_id="gallery-position")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            images = gallery("Your images", 4, visible=False, buttons=[], allow_preview=False, elem_id="gallery-images")
            with gr.Row(elem_classes="acts"):
                small: dict[str, Any] = {"visible": False, "size": "sm", "scale": 0, "min_width": 120}
                newer = gr.Button("Newer", elem_id="gallery-newer", **small)
                older = gr.Button("Older", elem_id="gallery-older", **small)
        with gr.Column(scale=2, min_width=300, visible=False, elem_classes="card", elem_id="gallery-details") as details:
            image = gr.Image(label="Image", interactive=False, format="png", buttons=["fullscreen"], elem_classes="sheet")
            about = gr.HTML(elem_id="gallery-about")
            with gr.Row():
                again = gr.Button("Use again", variant="primary", min_width=110, elem_id="gallery-again")
                download = gr.DownloadButton("Download", min_width=110, elem_id="gallery-download")
                delete = gr.Button("Delete", min_width=110, elem_id="gallery-delete")
    gr.HTML(section("Results of training", "Select one to open its run."))
    run_note = gr.Markdown(NO_RUNS)
    runs = gallery("Your runs", 4, visible=False, buttons=[], allow_preview=False, elem_id="gallery-runs")
    names, number, selected, run_names = gr.State(list[str]()), gr.State(0), gr.State(""), gr.State(list[list[str]]())
    page_outputs = [images, names, number, position, newer, older]
    details_outputs = [image, about, download, details, selected]
    _wire_images(context, page_outputs, details_outputs, (newer, older, delete))
    _wire_updates(context, page_outputs, [runs, run_names, run_note])
    return GalleryView(selected, again, runs, run_names)


def _wire_images(context: Context, page_outputs: list[Any], details_outputs: list[Any], buttons: Any) -> None:
    """Connects paging, selection and deletion."""
    newer, older, delete = buttons
    images, names, number, *_ = page_outputs
    *_, details, selected = details_outputs

    def handle_newer(request: gr.Request, page: int) -> list[Any]:
        return show_page(context.workspace(request), page - 1)

    def handle_older(request: gr.Request, page: int) -> list[Any]:
        return show_page(context.workspace(request), page + 1)

    def select(request: gr.Request, image_names: list[str], event: gr.SelectData) -> list[Any]:
        return show_image(context.workspace(request), image_names[event.index] if event.index < len(image_names) else "")

    def handle_delete(request: gr.Request, name: str, page: int) -> list[Any]:
        workspace = context.workspace(request)
        ImageStore.of(workspace).delete(name)
        return [*show_page(workspace, page), gr.Column(visible=False), ""]

    newer.click(show_errors(handle_newer), [number], page_outputs, **QUIET)
    older.click(show_errors(handle_older), [number], page_outputs, **QUIET)
    event = images.select(show_errors(select), [names], details_outputs, **QUIET)
    event.success(None, js="() => reveal('gallery-details')", **QUIET)
    delete.click(show_errors(handle_delete), [selected, number], [*page_outputs, details, selected], js=CONFIRM_DELETE, **QUIET)


def _wire_updates(context: Context, page_outputs: list[Any], run_outputs: list[Any]) -> None:
    """Shows new images and runs when the page is opened and whenever there are any."""
    known = gr.State(list[Any]())
    number = page_outputs[2]

    def stamp(request: gr.Request) -> list[Any]:
        workspace = context.workspace(request)
        return names(workspace, finished_runs(workspace))

    def names(workspace: Workspace, jobs: Sequence[Job]) -> list[Any]:
        return [[file.name for file in ImageStore.of(workspace).files()], [job.name for job in jobs]]

    def refresh(request: gr.Request, page: int, previous: list[Any] | None) -> list[Any]:
        workspace = context.workspace(request)
        jobs = finished_runs(workspace)
        now = names(workspace, jobs)
        old = previous or [None, None]
        pages = show_page(workspace, page) if now[0] != old[0] else [gr.skip()] * len(page_outputs)
        run_values = [gr.skip()] * len(run_outputs)
        if now[1] != old[1]:
            keys = [[job.kind, job.name] for job in jobs]
            run_values = [gr.Gallery(run_thumbnails(jobs), visible=bool(jobs)), keys, "" if jobs else NO_RUNS]
        return [*pages, *run_values, now if now != previous else gr.skip()]

    def load(request: gr.Request, page: int) -> list[Any]:
        return refresh(request, page, None)

    outputs = [*page_outputs, *run_outputs, known]
    gr.on(None, show_errors(load), [number], outputs, **QUIET)
    watch("gallery", stamp).change(show_errors(refresh), [number, known], outputs, **QUIET)


def connect_gallery(context: Context, tabs: gr.Tabs, built: Mapping[str, Any]) -> None:
    """Connects the gallery to the other pages.

    Args:
        built: return values of the pages by slug: this page's `GalleryView`, a `GenerateForm`, and the views of runs.
    """
    view: GalleryView = built[PAGE.slug]
    form = built["generate"]
    views = {"train": built["train"][0], "control": built["control"], "classify": built["classify"]}

    def use_again(request: gr.Request, name: str) -> list[Any]:
        workspace = context.workspace(request)
        return [gr.Tabs(selected="generate"), *form_for_image(workspace, str(ImageStore.of(workspace).find(name)))]

    def open_run(request: gr.Request, keys: list[list[str]], event: gr.SelectData) -> list[Any]:
        kind, name = keys[event.index]
        workspace = context.workspace(request)
        choice = select_job(workspace, kind, workspace.job(name))
        return [gr.Tabs(selected=kind), *(choice if each == kind else gr.skip() for each in views)]

    view.again.click(show_errors(use_again), [view.selected], [tabs, *form.outputs], **QUIET)
    view.runs.select(show_errors(open_run), [view.run_names], [tabs, *(each.choice for each in views.values())], **QUIET)


PAGE = Page("Gallery", "gallery", "", build)
