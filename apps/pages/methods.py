"""The catalogue of methods: what each does, where it fits, and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from veneer.catalogue import Count, Described, catalogue, counts, for_models
from veneer.full_size import MODELS
from veneer.injection import VeneerError, methods

from ..studio import Studio, explained
from ..workspace import bounded
from . import Page
from ._method_words import listed

AREAS = [("All models", ""), ("Diffusion: draws pictures", "diffusion"), ("Vision: tells what is on pictures", "vision")]
KINDS = {
    "selective": "Selective: trains some of the model's own numbers",
    "additive": "Additive: puts small new layers in",
    "prompt": "Prompt: learns words, tokens or borders of pictures",
    "reparameterized": "Reparameterised: learns a small change of a weight",
    "hybrid": "Hybrid: several of these",
}
SORTS = [("By name", "name"), ("Fewest trained numbers first", "trained")]


def known() -> list[Described]:
    """Every method, those of other distributions too; read anew when one is registered."""
    return _known(tuple(methods.names()))


@functools.lru_cache(maxsize=1)
def _known(names: tuple[str, ...]) -> list[Described]:
    return catalogue()


def kinds() -> list[tuple[str, str]]:
    """Kinds that some method is of; methods of another distribution are a kind of their own."""
    found = sorted({method.kind for method in known()}, key=lambda kind: [*KINDS, kind].index(kind))
    return [("All kinds", ""), *((KINDS.get(kind, f"From {kind}"), kind) for kind in found)]


def shown(words: str, area: str, kind: str, sort: str, model: str, told: Callable[[int, int], None] | None = None) -> str:
    """The methods that match, as HTML.

    Args:
        words: all of which must be somewhere in its name, its docstring or its paper.
        area: `diffusion`, `vision` or "" for both. `kind`: or "" for all. `sort`: `name` or `trained`.
        model: on which numbers are counted, or "" for none. `told`: progress.
    Raises:
        VeneerError: a filter that there is not, or more words than are allowed.
    """
    for value, allowed in ((area, AREAS), (kind, kinds()), (sort, SORTS), (model, [("", ""), *((m, m) for m in MODELS)])):
        if value not in [each for _, each in allowed]:
            raise VeneerError("There is no such choice. Choose one of the list.")
    sought = bounded(words or "", "The search").lower().split()
    found = [m for m in known() if (not kind or m.kind == kind) and all(word in _all(m) for word in sought)]
    if area:
        fitting = for_models(area)
        found = [m for m in found if m.name in fitting]
    trained = counts(model, told) if model else None
    if sort == "trained":
        found = _fewest_first(found, trained)
    return listed(found, trained, model)


def _fewest_first(found: Sequence[Described], trained: Mapping[str, Count | None] | None) -> list[Described]:
    if trained is None:
        raise VeneerError("Choose a model first: how many numbers a method trains depends on it.")
    numbers = {name: count.trained for name, count in trained.items() if count is not None}
    return sorted(found, key=lambda m: (numbers.get(m.name, float("inf")), m.name))


def _all(method: Described) -> str:
    return " ".join((method.name, method.about, method.text, method.paper)).lower()


def build(studio: Studio) -> None:
    """The page."""
    with gr.Row():
        words = gr.Textbox(
            label="Search", placeholder="such as: rank, bias, convolution", elem_id="methods-search", min_width=240
        )
        area = gr.Dropdown(AREAS, value="", label="For", elem_id="methods-area", min_width=240)
        kind = gr.Dropdown(kinds(), value="", label="Kind", elem_id="methods-kind", min_width=240)
    with gr.Row():
        choices = [("No model", ""), *((name, name) for name in MODELS)]
        about = "Counted by putting each method on it, which takes some seconds the first time."
        model = gr.Dropdown(choices, value="", label="Trained numbers on", info=about, elem_id="methods-model", min_width=240)
        sort = gr.Dropdown(SORTS, value="name", label="Order", info="By numbers only with a model.", min_width=240)
    page = gr.HTML(shown("", "", "", "name", ""), elem_id="methods-list", label="Methods")
    filters: list[Any] = [words, area, kind, sort, model]
    settings: dict[str, Any] = {"concurrency_id": "methods", "concurrency_limit": 1, "api_visibility": "private"}
    gr.on([each.change for each in filters], explained(_seen), filters, page, **settings, trigger_mode="always_last")


def _seen(words: str, area: str, kind: str, sort: str, model: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    return shown(words, area, kind, sort, model, lambda done, all_: progress((done, all_), desc=f"Counting on {model}"))


PAGE = Page("Methods", "methods", "What can be trained, what each method does, where it fits, and how little it trains.", build)
