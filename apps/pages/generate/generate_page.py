"""Draw with adapters: several at once, with and without, and at rising strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from veneer.pipelines.generate import draws

from veneer import base_models
from veneer.control.generation import follows
from veneer.injection import OptionError, StateError, VeneerError
from veneer.training.report.image_grid import Row, sheet
from veneer.training.report.previews import save_png

from ...context import Studio, escaped, explained
from ...generator import Use
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, shown
from ..page import Page
from ..shared.adapter_lists import follow
from ..shared.events import DRAWS, QUIET
from ..shared.generation_fields import Fields, fields, values
from ..shared.generation_request import STRONGEST, Shown, Wish, defaults, drawn, recalled, shortened, used, wished, written
from ..shared.images import gallery, new_folder, photo
from ..shared.job_view import ADAPTER
from ..shared.trigger_tokens import missing
from ..shared.verdict import read_result

SWEPT = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Strengths of a sweep, as parts of those that are set."""
WAYS = {"With the adapters": "with", "Side by side: without and with": "both", "A row of rising strengths": "sweep"}
EXAMPLES = 4
Drawn = Iterator[tuple[list[Shown], str]]


def plain_adapters(workspace: Workspace) -> list[str]:
    """Names of adapters that are given nothing when they draw."""
    return [name for name, file in workspace.all_adapters().items() if _plain(file)]


def _plain(file: Path) -> bool:
    try:
        return draws(file) and follows(file) is None
    except (VeneerError, OSError):
        return False


def draw(studio: Studio, workspace: Workspace, wish: Wish, names: Sequence[str], strengths: Sequence[Any], way: str) -> Drawn:
    """Pictures so far with captions, and how far it is; first the newest sheet of a sweep.

    Raises:
        VeneerError: what cannot be drawn.
    """
    uses = used(workspace, names, strengths)
    kinds = {"with": 1, "both": 2, "sweep": len(SWEPT)}
    if way not in kinds:
        message = "choose what to draw: with the adapters, side by side, or a row of strengths."
        raise OptionError(message, option="way", given=way, expected=tuple(kinds))
    if way != "with" and not uses:
        message = "there is no adapter to compare. Choose one, or draw the base alone."
        raise OptionError(message, option="adapters", given=0)
    count = wish.count * kinds[way]
    if count > LIMITS.pictures:
        message = f"that would be {count} pictures; expected at most {LIMITS.pictures}. Ask for fewer."
        raise OptionError(message, option="pictures", given=count, expected=LIMITS.pictures)
    yield [], f"0 of {count}"
    wish, note = shortened(studio.painter, wish, uses)
    for found, told in (_sweep if way == "sweep" else _plainly)(studio, wish, uses, way):
        yield found, f"{told}\n\n{note}" if note else told


def _plainly(studio: Studio, wish: Wish, uses: dict[str, Use], way: str) -> Drawn:
    """Pictures one after the other; each beside that of the base from the same noise, if that is wanted."""
    folder, found = new_folder(), list[Shown]()
    count = wish.count * (2 if way == "both" else 1)
    bare: Any = drawn(studio.painter, wish, uses, bare=True) if way == "both" else None
    for made in drawn(studio.painter, wish, uses):
        without = next(bare) if bare else [None] * len(made)
        for picture, other in zip(made, without, strict=True):
            if other is not None:
                found.append(written(folder, other, wish, {}, "without"))
            found.append(written(folder, picture, wish, uses, "with" if bare else ""))
        yield [*found], f"{len(found)} of {count}"


def _sweep(studio: Studio, wish: Wish, uses: dict[str, Use], way: str) -> Drawn:
    """A sheet: a row for each seed, a column for each strength; and its pictures."""
    folder, found, columns = new_folder(), list[Shown](), list[list[Any]]()
    for part in SWEPT:
        weaker = {name: Use(use.file, part * use.strength) for name, use in uses.items()}
        columns.append([p for made in drawn(studio.painter, wish, weaker, bare=part == 0) for p in made])
        found += [written(folder, p, wish, weaker, f"strength × {part:g}") for p in columns[-1]]
        yield [*found], f"{len(found)} of {wish.count * len(SWEPT)}"
    rows = [Row(f"seed {row[0].seed}", tuple((p.image,) for p in row)) for row in zip(*columns, strict=True)]
    page = sheet(rows, title=wish.prompt, note=", ".join(uses), columns=[f"× {part:g}" for part in SWEPT])
    facts = {
        **columns[-1][0].settings,
        "base": wish.base,
        "adapters": [{"file": n, "scale": u.strength} for n, u in uses.items()],
    }
    grid = save_png(page, folder / "strengths.png", facts)
    yield [(str(grid), "all strengths"), *found], f"{len(found)} pictures, and all of them on one sheet"


def settings_of(workspace: Workspace, path: str | Path | None) -> tuple[Wish, dict[str, float], str]:
    """What a picture was drawn with, and what to say of it.

    Raises:
        VeneerError: see `recalled`.
    """
    wish, there, missing = recalled(workspace, path)
    note = "The settings are in their places: draw."
    if missing:
        note = f"The settings are in their places, but for adapters that you do not have: {', '.join(map(escaped, missing))}."
    return wish, there, note


def build(studio: Studio) -> Desk:
    """The page."""
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("Try one of these, or write your own:")
            with gr.Row():
                usual = base_models.preset("bundled").unrelated[:EXAMPLES]
                tries = [(text, gr.Button(text, size="sm", min_width=130)) for text in usual]
            parts: list[Any] = []
            places = fields("generate", below=lambda: parts.extend(_adapters()))
            choice, rows, way = parts
            with gr.Row(elem_classes="action"):
                go = gr.Button("Generate", variant="primary", min_width=130, elem_id="generate-draw")
                stop = gr.Button("Stop", min_width=80, elem_id="generate-stop")
        with gr.Column(min_width=300):
            state = gr.Markdown(
                "No image yet. Write a prompt and press *Generate*, or take an example.", elem_id="generate-state"
            )
            pointer = _pointer()
            pictures = gallery("Images", 2, buttons=["download", "fullscreen"], elem_id="generate-gallery")
            again = gr.Button("Use the settings of the chosen image", size="sm", visible=False, elem_id="generate-again")
            with gr.Accordion("Use the settings of an image on your disk", open=False):
                brought = photo("A PNG that was drawn here", height=180, elem_id="generate-brought")
    kept, chosen = gr.State(list[str]()), gr.State(0)
    buttons = [(go, None), *((button, text) for text, button in tries)]
    _wire(studio, places, (choice, rows), way, buttons, stop, (pictures, state, kept), pointer)
    _wire_settings(studio, places, (choice, rows), (pictures, again, brought), (state, kept, chosen))
    return Desk([*places.all(), choice, *rows, state])


@dataclass(frozen=True)
class Desk:
    """What another page fills in: see `prepared`."""

    outputs: list[Any]


def prepared(workspace: Workspace, job: Job) -> list[Any]:
    """Values of `Desk.outputs` that generate with the adapter of a job: its base, a prompt with its token, and itself.

    Raises:
        VeneerError: it has no adapter.
    """
    name = next((name for name, file in workspace.all_adapters().items() if file == job.run / ADAPTER), None)
    if name is None:
        message = "this run has no adapter yet. Wait for its end, or stop it and keep what it has."
        raise StateError(message, where=job.name, given=job.state)
    config = read_result(job).get("config") or {}
    flags = dict(word[2:].split("=", 1) for word in job.about.get("words", []) if word.startswith("--") and "=" in word)
    base, concept = (str(config.get(key) or flags.get(key) or "") for key in ("base", "concept"))
    usual = base_models.preset(base or "bundled")
    prompt = next(iter(usual.previews or usual.templates), "a {concept}").replace("{concept}", concept)
    steps, guidance, negative, side = defaults(base)
    wish = Wish(base or "bundled", prompt, negative, 0, steps, guidance, (side, side) if side else None, 4)
    sliders = [gr.Slider(value=1.0, visible=True, label=f"Strength of {name}")]
    sliders += [gr.Slider(visible=False)] * (LIMITS.adapters - 1)
    note = f"**{escaped(shown(name))}** is selected, and its token is in the prompt: press *Generate*."
    return [*values(wish), gr.Dropdown(choices=plain_adapters(workspace), value=[name], multiselect=True), *sliders, note]


def connect(studio: Studio, tabs: gr.Tabs, built: Mapping[str, Any]) -> None:
    """Let the button of a finished run open this page, filled in.

    Args:
        built: what the pages gave by slug: a `Desk` of this one, a `JobView` and a button of those that train.
    """

    def open_with(request: gr.Request, name: str | None) -> list[Any]:
        workspace = studio.workspace(request)
        return [gr.Tabs(selected=PAGE.slug), *prepared(workspace, workspace.job(str(name)))]

    view, button = built["teach"]
    desk: Desk = built[PAGE.slug]
    button.click(explained(open_with), [view.choice], [tabs, *desk.outputs], **QUIET)


def _pointer() -> list[Any]:
    """Buttons below a note that a token's adapter is not selected, and the adapters that the first one selects."""
    with gr.Row(visible=False) as row:
        use = gr.Button("Select it and generate", variant="primary", size="sm", min_width=160, elem_id="generate-use")
        anyway = gr.Button("Generate without it", size="sm", min_width=160, elem_id="generate-anyway")
    return [row, use, anyway, gr.State(list[str]())]


def _adapters() -> tuple[gr.Dropdown, list[gr.Slider], gr.Radio]:
    """A list of adapters, a slider for each that is chosen, and what is compared."""
    choice = gr.Dropdown(
        [], value=[], multiselect=True, max_choices=LIMITS.adapters, label="Adapters", elem_id="generate-adapters",
        info="What you have trained or brought, several at once. None: the base alone.",
    )  # fmt: skip
    rows = [
        gr.Slider(-STRONGEST, STRONGEST, value=1.0, step=0.05, label=f"Strength {i + 1}", visible=False, elem_id=f"generate-s{i}")
        for i in range(LIMITS.adapters)
    ]
    way = gr.Radio(list(WAYS.items()), value="with", label="Compare", elem_id="generate-way")
    return choice, rows, way


def _wire(
    studio: Studio, places: Fields, adapters: Any, way: gr.Radio, buttons: Any, stop: gr.Button, parts: Any, pointer: Any
) -> None:
    """Generating, and the list of adapters."""
    choice, rows = adapters
    row, use, anyway, wanted = pointer
    inputs, outputs = [*places.all(), choice, way, *rows], [*parts, row, wanted]
    count = len(places.all())

    def run(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        """Generate, unless a token's adapter is not selected: then say so."""
        workspace = studio.workspace(request)
        absent = missing(workspace, str(given[1] or ""), given[count] or [], plain_adapters(workspace))
        if absent.known:
            yield [gr.skip(), absent.words(), gr.skip(), gr.Row(visible=True), absent.adapters]
            return
        for found in run_anyway(request, *given):
            yield [found[0], f"{found[1]}\n\n{absent.words()}".strip(), *found[2:]]

    def run_anyway(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        names, how, strengths = given[count] or [], given[count + 1], given[count + 2 :]
        for found, told in draw(studio, studio.workspace(request), wished(*given[:count]), names, strengths, how):
            yield [found, told, [path for path, _ in found], gr.Row(visible=False), []]

    def select(request: gr.Request, names: list[str] | None, more: list[str]) -> Any:
        return gr.Dropdown(choices=plain_adapters(studio.workspace(request)), value=[*(names or []), *more], multiselect=True)

    events = [places.prompt.submit(explained(run), inputs, outputs, **DRAWS)]
    selected = use.click(explained(select), [choice, wanted], [choice], **QUIET)
    events.append(selected.then(explained(run), inputs, outputs, **DRAWS))
    events.append(anyway.click(explained(run_anyway), inputs, outputs, **DRAWS))
    for button, text in buttons:
        event = button.click
        if text is not None:
            event = button.click(lambda text=text: text, None, [places.prompt], **QUIET).then
        events.append(event(explained(run), inputs, outputs, **DRAWS))
    stop.click(None, cancels=events, **QUIET)
    follow(studio, [choice], lambda workspace, _: [gr.Dropdown(choices=plain_adapters(workspace))], choice)
    choice.change(labelled, [choice], rows, **QUIET)


def labelled(names: list[str] | None) -> list[Any]:
    """A slider with its name for each adapter that is chosen."""
    known = list(names or [])[: LIMITS.adapters]
    labels = [f"Strength of {name}" for name in known] + [""] * (LIMITS.adapters - len(known))
    return [gr.Slider(visible=bool(label), label=label) for label in labels]


def _wire_settings(studio: Studio, places: Fields, adapters: Any, parts: Any, states: Any) -> None:
    """Settings of a picture of the gallery, or of one that is brought, into the fields."""
    (choice, rows), (pictures, again, brought), (state, kept, chosen) = adapters, parts, states
    outputs = [*places.all(), choice, *rows, state]

    def back(request: gr.Request, path: str | None) -> list[Any]:
        wish, there, note = settings_of(studio.workspace(request), path)
        choices = plain_adapters(studio.workspace(request))
        strengths = [gr.Slider(value=s, visible=True, label=f"Strength of {n}") for n, s in there.items()]
        hidden = [gr.Slider(visible=False)] * (LIMITS.adapters - len(strengths))
        return [*values(wish), gr.Dropdown(choices=choices, value=list(there), multiselect=True), *strengths, *hidden, note]

    def from_gallery(request: gr.Request, paths: list[str], index: int) -> list[Any]:
        return back(request, paths[index] if 0 <= index < len(paths) else None)

    def pick(event: gr.SelectData) -> int:
        return int(event.index)

    kept.change(lambda paths: [gr.Button(visible=bool(paths)), 0], [kept], [again, chosen], **QUIET)
    pictures.select(pick, None, [chosen], **QUIET)
    again.click(explained(from_gallery), [kept, chosen], outputs, **QUIET)
    brought.upload(explained(back), [brought], outputs, **QUIET)


PAGE = Page("Generate", "generate", "Write a prompt, and generate with adapters: several at once, with and without.", build)
