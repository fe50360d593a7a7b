"""What is in an adapter's file, and other files made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.injection import OptionError, VeneerError

from ...context import Studio, explained
from ...limits import LIMITS
from ...workspace import Workspace, bounded
from ..page import Page
from ..shared.adapter_lists import SECONDS
from ..shared.events import FILES, QUIET
from ..shared.html import note
from ..shared.job_view import offered
from . import files
from .details import EMPTY, FORMATS, NONE_CHOSEN, described, fitting

WAYS = [
    ("Add them up exactly (LoRA only)", "sum"),
    ("Add them up, then cut to a rank", "svd"),
    ("Keep what is large and agrees in sign (TIES)", "ties"),
    ("Drop most at random, make the rest larger (DARE)", "dare"),
    ("Both (DARE, then TIES)", "dare_ties"),
]
SURE = """(name) => { if (!name || !confirm(`Delete ${name} for good?`)) throw new Error("kept"); return [name] }"""


def listed(workspace: Workspace, name: str | None, known: list[str] | None) -> list[Any]:
    """The list of adapters with `name` chosen if there is one, and the names; nothing new if they are those that are `known`."""
    found = [*workspace.all_adapters()]
    if found == known:
        return [gr.skip(), gr.skip(), gr.skip()]
    chosen = name if name in found else (found[0] if found else None)
    return [gr.Dropdown(choices=found, value=chosen), gr.Dropdown(choices=files.mergeable(workspace)), found]


def shown(workspace: Workspace, name: str | None) -> str:
    """What the page says of a file; of one that cannot be read any more, why."""
    if not name:
        return NONE_CHOSEN if workspace.all_adapters() else EMPTY
    try:
        return described(files.seen(workspace, name), files.trained_on(workspace, name))
    except VeneerError as error:
        return note(str(error), "bad")


def brought(workspace: Workspace, path: str | Path | None) -> tuple[str | None, str]:
    """The name of an uploaded file in the workspace, and what to say: why it was refused, in which case there is no name."""
    if path is None:
        return None, ""
    try:
        name = files.bring(workspace, path)
    except (VeneerError, ValueError, OSError) as error:
        return None, note(f"Not taken. {error}", "bad")
    return name, note(f"Taken as {name}.", "good")


def fits(workspace: Workspace, name: str | None, base: str | None) -> str:
    """How a file fits a base."""
    base = _base(base)
    return fitting(files.seen(workspace, _chosen(name), base), base)


def weights_for(names: Sequence[str]) -> list[Any]:
    """A field for the weight of each chosen adapter."""
    return [
        gr.Number(visible=i < len(names), label=f"Weight of {names[i]}" if i < len(names) else "") for i in range(LIMITS.adapters)
    ]


def made(workspace: Workspace, outcome: files.Outcome) -> list[Any]:
    """The list with the new file in it, its report, and the file to download. What was chosen stays so."""
    found = [*workspace.all_adapters()]
    return [
        gr.Dropdown(choices=found),
        gr.Dropdown(choices=files.mergeable(workspace)),
        found,
        gr.Textbox(outcome.report, visible=True),
        _given(outcome.file, *outcome.words),
    ]


def build(studio: Studio) -> None:
    """The page."""
    known = gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            chosen = gr.Dropdown(
                [], value=None, label="Adapter", info="Uploaded, made here, and trained by jobs.", elem_id="adapter"
            )
            file = gr.File(label="Upload a .safetensors file", height=130, elem_id="adapter-file")
            example = gr.Button("Use the example", size="sm", elem_id="adapter-example")
            said = gr.HTML(elem_id="adapter-said")
            give = gr.Button("Download it", size="sm")
            got = gr.File(label="Download", file_count="multiple", visible=False, interactive=False, elem_id="adapter-download")
            with gr.Accordion("Rename or delete", open=False):
                name = gr.Textbox(label="New name", max_length=LIMITS.text)
                with gr.Row():
                    rename = gr.Button("Rename", size="sm", min_width=120)
                    delete = gr.Button("Delete", size="sm", variant="stop", min_width=120)
        with gr.Column(scale=2, min_width=300):
            about = gr.HTML(EMPTY, elem_id="adapter-about")
            base = gr.Dropdown(
                ["bundled"], value="bundled", allow_custom_value=True, label="Base", elem_id="adapter-base",
                info="The model that the adapter is for: bundled, a folder of diffusers, or a hub name.",
            )  # fmt: skip
            check = gr.Button("Does it fit this base?", elem_id="adapter-check")
            fit = gr.HTML(elem_id="adapter-fit")
            to, convert = _convert_form()
            rank, energy, resize_to, resize = _resize_form()
            several, weights, how, merge_rank, merge_to, merge = _merge_form()
            report = gr.Textbox(label="What was made", lines=4, interactive=False, visible=False, elem_id="adapter-report")
            new = gr.File(
                label="Download what was made", file_count="multiple", visible=False, interactive=False, elem_id="adapter-new"
            )

    lists, results = [chosen, several, known], [chosen, several, known, report, new]

    def at(function: Callable[..., Any]) -> Any:
        """A handler that is given the visitor's workspace, and then the event's values."""

        def asked(request: gr.Request, *given: Any) -> Any:
            return function(studio.workspace(request), *given)

        return explained(asked)

    gr.on(None, at(lambda w: listed(w, None, None)), None, lists, **QUIET)
    gr.Timer(SECONDS).tick(at(listed), [chosen, known], lists, **QUIET)
    chosen.change(at(lambda w, n: (shown(w, n), "", gr.File(visible=False))), chosen, [about, fit, got], api_visibility="private")
    file.upload(at(_taken), file, [*lists, said, file], api_visibility="private")
    example.click(at(lambda w: listed(w, files.example(w), None)), None, lists, **FILES)
    give.click(at(lambda w, n: _given(w.adapter(_chosen(n)))), chosen, got, api_visibility="private")
    rename.click(
        at(lambda w, n, new: [*listed(w, files.rename(w, _chosen(n), new), None), ""]), [chosen, name], [*lists, name], **QUIET
    )
    delete.click(at(_deleted), chosen, lists, **QUIET, js=SURE)
    check.click(at(fits), [chosen, base], fit, **FILES)
    convert.click(
        at(lambda w, n, b, f: made(w, files.converted(w, _chosen(n), f, _base(b)))), [chosen, base, to], results, **FILES
    )
    resize.click(
        at(lambda w, n, b, r, e, f: made(w, files.resized(w, _chosen(n), _base(b), r, e, f))),
        [chosen, base, rank, energy, resize_to], results, **FILES,
    )  # fmt: skip
    several.change(weights_for, several, weights, **QUIET)
    merge.click(at(_merged), [several, base, how, merge_rank, merge_to, *weights], results, **FILES)


def _convert_form() -> tuple[gr.Dropdown, gr.Button]:
    with gr.Accordion("Convert to another format", open=False, elem_id="adapter-convert"):
        to = _format("kohya", "Format", "Who should read it.")
        return to, gr.Button("Convert", variant="primary")


def _resize_form() -> tuple[gr.Number, gr.Slider, gr.Dropdown, gr.Button]:
    with gr.Accordion("Resize to another rank", open=False, elem_id="adapter-resize"):
        rank = gr.Number(4, label="New rank", info="Lower: a smaller file with nearly the same effect.", precision=0, minimum=1)
        energy = gr.Slider(
            0.5,
            1,
            value=1,
            step=0.01,
            label="Share of the weight update to keep",
            info="Below 1, layers that need less get a lower rank.",
        )
        to = _format("", "Format", "", "as the file")
        return rank, energy, to, gr.Button("Resize", variant="primary")


def _merge_form() -> tuple[gr.Dropdown, list[gr.Number], gr.Dropdown, gr.Number, gr.Dropdown, gr.Button]:
    with gr.Accordion("Merge: several adapters as one LoRA", open=False, elem_id="adapter-merge"):
        several = gr.Dropdown(
            [],
            multiselect=True,
            max_choices=LIMITS.adapters,
            label="Adapters",
            info="Two or more; classifiers and controls cannot be merged. Trained tokens go along.",
        )
        with gr.Row():
            weights = [gr.Number(1, label="", visible=False, min_width=160, step=0.1) for _ in range(LIMITS.adapters)]
        how = gr.Dropdown(WAYS, value="sum", label="How")
        rank = gr.Number(
            None, label="Rank of the result", precision=0, minimum=1, info="Empty: the largest of theirs.", visible=False
        )
        how.change(lambda way: gr.Number(visible=way != "sum"), how, rank, **QUIET)
        to = _format("", "Format", "", "as the first file")
        return several, weights, how, rank, to, gr.Button("Merge", variant="primary")


def _format(value: str, label: str, info: str, otherwise: str = "") -> gr.Dropdown:
    choices = [(text, name) for name, text in FORMATS.items()]
    return gr.Dropdown([(otherwise, ""), *choices] if otherwise else choices, value=value, label=label, info=info or None)


def _taken(workspace: Workspace, path: str | None) -> list[Any]:
    name, words = brought(workspace, path)
    return [*listed(workspace, name, None if name else [*workspace.all_adapters()]), words, None]


def _deleted(workspace: Workspace, name: str | None) -> list[Any]:
    files.delete(workspace, _chosen(name))
    return listed(workspace, None, None)


def _merged(
    workspace: Workspace, names: list[str], base: str, how: str, rank: float | None, to: str, *weights: float
) -> list[Any]:
    return made(workspace, files.merged(workspace, names, weights[: len(names)], _base(base), how, rank, to))


def _given(*files: Path) -> gr.File:
    """Files to download."""
    return gr.File(offered(files), visible=True)


def _chosen(name: str | None) -> str:
    if not name:
        message = "No adapter is chosen. Choose one of the list, or bring a file first."
        raise OptionError(message, option="adapter", given=None)
    return name


def _base(base: str | None) -> str:
    named = bounded(base or "", "The base")
    if not named:
        raise OptionError("No base is named. Choose `bundled`, or type a folder or a hub name.", option="base", given="")
    return named


PAGE = Page("Adapters", "adapters", "See what is in an adapter's file, and convert, merge or resize it.", build)
