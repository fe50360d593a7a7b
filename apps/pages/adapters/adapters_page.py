"""Page Adapters: inspect, convert, resize and merge adapter files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.base_models import ARCHITECTURES
from veneer.injection import OptionError, VeneerError

from ...base_access import check_access
from ...context import Context, show_errors
from ...limits import LIMITS
from ...workspace import Workspace, check_text
from ..page import Page
from ..shared.adapter_lists import watch_adapters
from ..shared.events import FILES, QUIET
from ..shared.html import note, section
from ..shared.job_view import copy_for_download
from . import files
from .details import EMPTY, FORMATS, NONE_CHOSEN, describe_file, describe_fit
from .hub_fields import HubFields

MERGE_METHODS = [
    ("Exact sum (LoRA only)", "sum"),
    ("Sum, then reduce the rank (SVD)", "svd"),
    ("Trim small values, resolve sign conflicts (TIES)", "ties"),
    ("Drop values at random and rescale (DARE)", "dare"),
    ("DARE, then TIES", "dare_ties"),
]
CONFIRM_DELETE = """(name) => { if (!name || !confirm(`Delete ${name} for good?`)) throw new Error("kept"); return [name] }"""


def refresh_list(workspace: Workspace, name: str | None, known_names: list[str] | None) -> list[Any]:
    """Updates of the lists with `name` selected, and the names; no update if the names equal `known_names`."""
    found = [*workspace.all_adapters()]
    if found == known_names:
        return [gr.skip(), gr.skip(), gr.skip()]
    chosen = name if name in found else (found[0] if found else None)
    return [gr.Dropdown(choices=found, value=chosen), gr.Dropdown(choices=files.mergeable_adapters(workspace)), found]


def describe_adapter(workspace: Workspace, name: str | None) -> str:
    """Description of a file, or why it cannot be read."""
    if not name:
        return NONE_CHOSEN if workspace.all_adapters() else EMPTY
    try:
        return describe_file(files.inspect(workspace, name), files.base_of_adapter(workspace, name))
    except VeneerError as error:
        return note(str(error), "bad")


def upload(workspace: Workspace, path: str | Path | None) -> tuple[str | None, str]:
    """Stores an uploaded file; returns its name (None if it was rejected) and a note for the user."""
    if path is None:
        return None, ""
    try:
        name = files.store_upload(workspace, path)
    except (VeneerError, ValueError, OSError) as error:
        return None, note(f"Rejected: {error}", "bad")
    return name, note(f"Uploaded as {name}.", "good")


def check_fit(workspace: Workspace, name: str | None, base: str | None) -> str:
    """Compatibility of a file with a base model."""
    base = _check_base(base)
    return describe_fit(files.inspect(workspace, _check_chosen(name), base), base)


def weight_fields(names: Sequence[str]) -> list[Any]:
    """A weight field for each selected adapter."""
    return [
        gr.Number(visible=i < len(names), label=f"Weight of {names[i]}" if i < len(names) else "") for i in range(LIMITS.adapters)
    ]


def show_new_file(workspace: Workspace, result: files.ConversionResult) -> list[Any]:
    """Updates of the lists, the report and the download after a file was created; the selection stays."""
    found = [*workspace.all_adapters()]
    return [
        gr.Dropdown(choices=found),
        gr.Dropdown(choices=files.mergeable_adapters(workspace)),
        found,
        gr.Textbox(result.report, visible=True),
        _download(result.file, *result.embeddings),
    ]


def build(context: Context) -> None:
    """Builds the page."""
    known_names = gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            chosen = gr.Dropdown([], value=None, label="Adapter", info="Uploaded, created here, or trained.", elem_id="adapter")
            download = gr.Button("Download", size="sm")
            download_file = gr.File(
                label="Download",
                file_count="multiple",
                visible=False,
                interactive=False,
                elem_id="adapter-download",
                elem_classes="downloads",
            )
            with gr.Accordion("Rename or delete", open=False):
                name = gr.Textbox(label="New name", max_length=LIMITS.text)
                with gr.Row():
                    rename = gr.Button("Rename", size="sm", min_width=120)
                    delete = gr.Button("Delete", size="sm", variant="stop", min_width=120)
            gr.HTML(section("Add an adapter"))
            file = gr.File(label="A .safetensors file", height=130, elem_id="adapter-file")
            example = gr.Button("Use an example", size="sm", elem_id="adapter-example")
            hub = HubFields()
            upload_note = gr.HTML(elem_id="adapter-said")
        with gr.Column(scale=2, min_width=300):
            about = gr.HTML(EMPTY, elem_id="adapter-about")
            base = gr.Dropdown(
                ["bundled", *ARCHITECTURES], value="bundled", allow_custom_value=True, label="Base model",
                elem_id="adapter-base",
                info="The model of the adapter: bundled, a diffusers folder, a hub name, or an architecture without weights.",
            )  # fmt: skip
            check = gr.Button("Check compatibility", elem_id="adapter-check")
            fit_report = gr.HTML(elem_id="adapter-fit")
            to, convert = _convert_form()
            rank, energy, resize_to, resize = _resize_form()
            several, weights, how, merge_rank, merge_to, merge = _merge_form()
            report = gr.Textbox(label="Report", lines=4, interactive=False, visible=False, elem_id="adapter-report")
            new = gr.File(
                label="Download the new file",
                file_count="multiple",
                visible=False,
                interactive=False,
                elem_id="adapter-new",
                elem_classes="downloads",
            )

    lists, results = [chosen, several, known_names], [chosen, several, known_names, report, new]

    def handler(function: Callable[..., Any]) -> Any:
        """Event handler that passes the user's workspace as the first argument."""

        def run(request: gr.Request, *given: Any) -> Any:
            return function(context.workspace(request), *given)

        return show_errors(run)

    gr.on(None, handler(lambda w: refresh_list(w, None, None)), None, lists, **QUIET)
    watch_adapters(context).change(handler(refresh_list), [chosen, known_names], lists, **QUIET)
    chosen.change(
        handler(lambda w, n: (describe_adapter(w, n), "", gr.File(visible=False))),
        chosen,
        [about, fit_report, download_file],
        api_visibility="private",
    )
    file.upload(handler(_handle_upload), file, [*lists, upload_note, file], api_visibility="private")
    hub.connect(handler, refresh_list, [*lists, upload_note])
    example.click(handler(lambda w: refresh_list(w, files.example(w), None)), None, lists, **FILES)
    download.click(handler(lambda w, n: _download(w.adapter(_check_chosen(n)))), chosen, download_file, api_visibility="private")
    rename.click(
        handler(lambda w, n, new: [*refresh_list(w, files.rename(w, _check_chosen(n), new), None), ""]),
        [chosen, name],
        [*lists, name],
        **QUIET,
    )
    delete.click(handler(_handle_delete), chosen, lists, **QUIET, js=CONFIRM_DELETE)
    check.click(handler(check_fit), [chosen, base], fit_report, **FILES)
    convert.click(
        handler(lambda w, n, b, f: show_new_file(w, files.convert_adapter(w, _check_chosen(n), f, _check_base(b)))),
        [chosen, base, to],
        results,
        **FILES,
    )
    resize.click(
        handler(lambda w, n, b, r, e, f: show_new_file(w, files.resize_adapter(w, _check_chosen(n), _check_base(b), r, e, f))),
        [chosen, base, rank, energy, resize_to], results, **FILES,
    )  # fmt: skip
    several.change(weight_fields, several, weights, **QUIET)
    merge.click(handler(_handle_merge), [several, base, how, merge_rank, merge_to, *weights], results, **FILES)


def _convert_form() -> tuple[gr.Dropdown, gr.Button]:
    with gr.Accordion("Convert to another format", open=False, elem_id="adapter-convert"):
        to = _format("kohya", "Format", "Formats and the tools that read them.")
        return to, gr.Button("Convert", variant="primary")


def _resize_form() -> tuple[gr.Number, gr.Slider, gr.Dropdown, gr.Button]:
    with gr.Accordion("Resize to another rank", open=False, elem_id="adapter-resize"):
        rank = gr.Number(4, label="New rank", info="Lower: a smaller file with nearly the same effect.", precision=0, minimum=1)
        energy = gr.Slider(
            0.5,
            1,
            value=1,
            step=0.01,
            label="Energy to keep",
            info="Share of the squared singular values; below 1, some layers get a lower rank.",
        )
        to = _format("", "Format", "", "same as the file")
        return rank, energy, to, gr.Button("Resize", variant="primary")


def _merge_form() -> tuple[gr.Dropdown, list[gr.Number], gr.Dropdown, gr.Number, gr.Dropdown, gr.Button]:
    with gr.Accordion("Merge several adapters into one LoRA", open=False, elem_id="adapter-merge"):
        several = gr.Dropdown(
            [],
            multiselect=True,
            max_choices=LIMITS.adapters,
            label="Adapters",
            info="Two or more; classifiers and control adapters cannot be merged. Token embeddings are included.",
        )
        with gr.Row():
            weights = [gr.Number(1, label="", visible=False, min_width=160, step=0.1) for _ in range(LIMITS.adapters)]
        how = gr.Dropdown(MERGE_METHODS, value="sum", label="Merge method")
        rank = gr.Number(
            None,
            label="Rank of the result",
            precision=0,
            minimum=1,
            info="Empty: the largest rank of the adapters.",
            visible=False,
        )
        how.change(lambda way: gr.Number(visible=way != "sum"), how, rank, **QUIET)
        to = _format("", "Format", "", "same as the first file")
        return several, weights, how, rank, to, gr.Button("Merge", variant="primary")


def _format(value: str, label: str, info: str, otherwise: str = "") -> gr.Dropdown:
    choices = [(text, name) for name, text in FORMATS.items()]
    return gr.Dropdown([(otherwise, ""), *choices] if otherwise else choices, value=value, label=label, info=info or None)


def _handle_upload(workspace: Workspace, path: str | None) -> list[Any]:
    name, words = upload(workspace, path)
    return [*refresh_list(workspace, name, None if name else [*workspace.all_adapters()]), words, None]


def _handle_delete(workspace: Workspace, name: str | None) -> list[Any]:
    files.delete(workspace, _check_chosen(name))
    return refresh_list(workspace, None, None)


def _handle_merge(
    workspace: Workspace, names: list[str], base: str, how: str, rank: float | None, to: str, *weights: float
) -> list[Any]:
    return show_new_file(
        workspace, files.merge_adapters(workspace, names, weights[: len(names)], _check_base(base), how, rank, to)
    )


def _download(*files: Path) -> gr.File:
    """Download component with copies of the files."""
    return gr.File(copy_for_download(files), visible=True)


def _check_chosen(name: str | None) -> str:
    if not name:
        message = "no adapter is selected. Select one, or upload a file first."
        raise OptionError(message, option="adapter", given=None)
    return name


def _check_base(base: str | None) -> str:
    named = check_text(base or "", "base model")
    if not named:
        raise OptionError("the base model is empty. Enter `bundled`, a folder or a hub name.", option="base", given="")
    return check_access(named)


PAGE = Page("Adapters", "adapters", "Inspect, convert, merge or resize adapter files.", build)
