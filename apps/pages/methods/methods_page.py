"""Page Methods: searchable catalog with supported models and parameter counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from veneer.full_size_models import MODELS
from veneer.injection import OptionError, methods
from veneer.method_catalog import MethodEntry, ParameterCount, catalog, count_parameters, methods_for
from veneer.method_search import USES, group_by_use, rank_methods, with_use

from ...context import Context, show_errors
from ...workspace import check_text
from ..page import Page
from .details import KINDS, method_list

AREAS = [("All models", ""), ("Diffusion: generates images", "diffusion"), ("Vision: classifies images", "vision")]
SORTS = [("By use, or by relevance to the search", "use"), ("By name", "name"), ("Fewest trainable parameters first", "trained")]


USE_CHOICES = [("Everything", ""), *((use.title, use.key) for use in USES)]


def all_methods() -> list[MethodEntry]:
    """All registered methods, including those of other packages."""
    return _known(tuple(methods.names()))


@functools.lru_cache(maxsize=1)
def _known(names: tuple[str, ...]) -> list[MethodEntry]:
    return catalog()


def kinds() -> list[tuple[str, str]]:
    """Choices of the field Kind; methods of each other package form a separate kind."""
    all_kinds = sorted({method.kind for method in all_methods()}, key=lambda kind: [*KINDS, kind].index(kind))
    return [("All kinds", ""), *((KINDS.get(kind, f"From {kind}"), kind) for kind in all_kinds)]


def render_methods(
    query_text: str,
    area: str,
    kind: str,
    sort: str,
    model: str,
    progress: Callable[[int, int], None] | None = None,
    use: str = "",
) -> str:
    """Renders the matching methods as HTML.

    Args:
        words: search text; with `sort="use"` the best match is first, see `rank_methods`.
        area: `diffusion`, `vision` or "" for both. `kind`: of method, or "" for all. `sort`: `use`, `name` or `trained`.
        model: for parameter counts, or "" for none. `progress`: callback of done and total.
        use: key of the use that the methods have, or "" for all.
    Raises:
        VeneerError: an unknown filter, or a search text that is too long.
    """
    models = [("", ""), *((m, m) for m in MODELS)]
    for name, value, choices in (
        ("area", area, AREAS),
        ("kind", kind, kinds()),
        ("sort", sort, SORTS),
        ("model", model, models),
        ("use", use, USE_CHOICES),
    ):
        allowed = tuple(each for _, each in choices)
        if value not in allowed:
            message = "this choice does not exist. Choose one from the list."
            raise OptionError(message, option=name, given=value, expected=allowed)
    query = check_text(query_text or "", "search").strip()
    matches = [m for m in all_methods() if not kind or m.kind == kind]
    if area:
        supported = methods_for(area)
        matches = [m for m in matches if m.name in supported]
    matches = rank_methods(with_use(matches, use) if use else matches, query)
    trained = count_parameters(model, progress) if model else None
    if sort == "use" and not query:
        selected_use = next((each for each in USES if each.key == use), None)
        groups = [(selected_use, matches)] if selected_use else group_by_use(matches)
        return method_list(groups, trained, model, start=not kind and not use)
    if sort == "name":
        matches = sorted(matches, key=lambda m: m.name)
    if sort == "trained":
        matches = _fewest_first(matches, trained)
    return method_list([(None, matches)], trained, model)


def _fewest_first(matches: Sequence[MethodEntry], trained: Mapping[str, ParameterCount | None] | None) -> list[MethodEntry]:
    if trained is None:
        message = "Choose a model first: the number of trainable parameters depends on it."
        raise OptionError(message, option="model", given="")
    numbers = {name: count.trainable for name, count in trained.items() if count is not None}
    return sorted(matches, key=lambda m: (numbers.get(m.name, float("inf")), m.name))


def build(context: Context) -> None:
    """Builds the page."""
    use = gr.Radio(USE_CHOICES, value="", label="What for", elem_id="methods-use")
    with gr.Row():
        query_text = gr.Textbox(
            label="Search", placeholder="such as: faces, few images, rank, vpt", elem_id="methods-search", min_width=240
        )
        area = gr.Dropdown(AREAS, value="", label="For", elem_id="methods-area", min_width=240)
        kind = gr.Dropdown(kinds(), value="", label="Kind", elem_id="methods-kind", min_width=240)
    with gr.Row():
        choices = [("No model", ""), *((name, name) for name in MODELS)]
        about = "Counted by attaching each method to the model; takes some seconds the first time."
        model = gr.Dropdown(
            choices, value="", label="Trainable parameters on", info=about, elem_id="methods-model", min_width=240
        )
        sort = gr.Dropdown(SORTS, value="use", label="Order", info="Sorting by parameters needs a model.", min_width=240)
    page = gr.HTML(render_methods("", "", "", "use", ""), elem_id="methods-list", label="Methods")
    filters: list[Any] = [query_text, area, kind, sort, model, use]
    settings: dict[str, Any] = {"concurrency_id": "methods", "concurrency_limit": 1, "api_visibility": "private"}
    gr.on([each.change for each in filters], show_errors(_handle_change), filters, page, **settings, trigger_mode="always_last")


def _handle_change(
    query_text: str,
    area: str,
    kind: str,
    sort: str,
    model: str,
    use: str,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> str:
    def report(done: int, total: int) -> None:
        progress((done, total), desc=f"Counting on {model}")

    return render_methods(query_text, area, kind, sort, model, report, use)


PAGE = Page(
    "Methods",
    "methods",
    "All methods, with their uses, supported models and numbers of trainable parameters.",
    build,
)
