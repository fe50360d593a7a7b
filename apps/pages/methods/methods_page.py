"""The catalog of methods: what each does, where it fits, and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from veneer.full_size_models import MODELS
from veneer.injection import OptionError, methods
from veneer.method_catalog import MethodEntry, ParameterCount, catalog, count_parameters, methods_for
from veneer.method_search import group_by_use, rank_methods

from ...context import Studio, explained
from ...workspace import bounded
from ..page import Page
from .details import listed

AREAS = [("All models", ""), ("Diffusion: generates images", "diffusion"), ("Vision: classifies images", "vision")]
KINDS = {
    "selective": "Selective: trains some of the model's own parameters",
    "additive": "Additive: adds small new layers",
    "prompt": "Prompt: trains token embeddings or pixels of the input",
    "reparameterized": "Reparameterized: trains a small weight update",
    "hybrid": "Hybrid: several of these",
}
SORTS = [("By use, or by match with the search", "use"), ("By name", "name"), ("Fewest trainable parameters first", "trained")]


def known() -> list[MethodEntry]:
    """Every method, those of other distributions too; read anew when one is registered."""
    return _known(tuple(methods.names()))


@functools.lru_cache(maxsize=1)
def _known(names: tuple[str, ...]) -> list[MethodEntry]:
    return catalog()


def kinds() -> list[tuple[str, str]]:
    """Kinds that some method is of; methods of another distribution are a kind of their own."""
    found = sorted({method.kind for method in known()}, key=lambda kind: [*KINDS, kind].index(kind))
    return [("All kinds", ""), *((KINDS.get(kind, f"From {kind}"), kind) for kind in found)]


def shown(words: str, area: str, kind: str, sort: str, model: str, told: Callable[[int, int], None] | None = None) -> str:
    """The methods that match, as HTML.

    Args:
        words: a search; the best match is first with `sort="use"`, see `rank_methods`.
        area: `diffusion`, `vision` or "" for both. `kind`: or "" for all. `sort`: `use`, `name` or `trained`.
        model: on which parameters are counted, or "" for none. `told`: progress.
    Raises:
        VeneerError: a filter that there is not, or more words than are allowed.
    """
    models = [("", ""), *((m, m) for m in MODELS)]
    for name, value, choices in (
        ("area", area, AREAS),
        ("kind", kind, kinds()),
        ("sort", sort, SORTS),
        ("model", model, models),
    ):
        allowed = tuple(each for _, each in choices)
        if value not in allowed:
            message = "There is no such choice. Choose one of the list."
            raise OptionError(message, option=name, given=value, expected=allowed)
    sought = bounded(words or "", "The search").strip()
    found = [m for m in known() if not kind or m.kind == kind]
    if area:
        fitting = methods_for(area)
        found = [m for m in found if m.name in fitting]
    found = rank_methods(found, sought)
    trained = count_parameters(model, told) if model else None
    if sort == "use" and not sought:
        return listed(group_by_use(found), trained, model, start=not kind)
    if sort == "name":
        found = sorted(found, key=lambda m: m.name)
    if sort == "trained":
        found = _fewest_first(found, trained)
    return listed([(None, found)], trained, model)


def _fewest_first(found: Sequence[MethodEntry], trained: Mapping[str, ParameterCount | None] | None) -> list[MethodEntry]:
    if trained is None:
        message = "Choose a model first: the number of trainable parameters depends on it."
        raise OptionError(message, option="model", given="")
    numbers = {name: count.trainable for name, count in trained.items() if count is not None}
    return sorted(found, key=lambda m: (numbers.get(m.name, float("inf")), m.name))


def build(studio: Studio) -> None:
    """The page."""
    with gr.Row():
        words = gr.Textbox(
            label="Search", placeholder="such as: faces, few images, rank, vpt", elem_id="methods-search", min_width=240
        )
        area = gr.Dropdown(AREAS, value="", label="For", elem_id="methods-area", min_width=240)
        kind = gr.Dropdown(kinds(), value="", label="Kind", elem_id="methods-kind", min_width=240)
    with gr.Row():
        choices = [("No model", ""), *((name, name) for name in MODELS)]
        about = "Attaches each method to the model and counts; takes some seconds the first time."
        model = gr.Dropdown(
            choices, value="", label="Trainable parameters on", info=about, elem_id="methods-model", min_width=240
        )
        sort = gr.Dropdown(SORTS, value="use", label="Order", info="By parameters only with a model.", min_width=240)
    page = gr.HTML(shown("", "", "", "use", ""), elem_id="methods-list", label="Methods")
    filters: list[Any] = [words, area, kind, sort, model]
    settings: dict[str, Any] = {"concurrency_id": "methods", "concurrency_limit": 1, "api_visibility": "private"}
    gr.on([each.change for each in filters], explained(_seen), filters, page, **settings, trigger_mode="always_last")


def _seen(words: str, area: str, kind: str, sort: str, model: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    return shown(words, area, kind, sort, model, lambda done, all_: progress((done, all_), desc=f"Counting on {model}"))


PAGE = Page(
    "Methods",
    "methods",
    "Every method: its use, the models that it supports, and how many parameters it trains.",
    build,
)
