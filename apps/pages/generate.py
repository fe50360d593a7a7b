"""Draw with adapters: several at once, with and without, and at rising strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from veneer.pipelines.generate import draws

from veneer import bases
from veneer.control.drawing import follows
from veneer.injection import VeneerError
from veneer.training.previews import save_png
from veneer.training.sheets import Row, sheet

from ..limits import LIMITS
from ..painter import Use
from ..studio import Studio, escaped, explained
from ..workspace import Workspace
from . import Page
from ._events import DRAWS, QUIET
from ._fields import Fields, fields, values
from ._lists import follow
from ._pictures import gallery, new_folder, photo
from ._wish import STRONGEST, Shown, Wish, drawn, recalled, used, wished, written

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
        raise VeneerError("choose what to draw: with the adapters, side by side, or a row of strengths.")
    if way != "with" and not uses:
        raise VeneerError("there is no adapter to compare. Choose one, or draw the base alone.")
    count = wish.count * kinds[way]
    if count > LIMITS.pictures:
        raise VeneerError(f"that would be {count} pictures; expected at most {LIMITS.pictures}. Ask for fewer.")
    yield [], f"0 of {count}"
    yield from (_sweep if way == "sweep" else _plainly)(studio, wish, uses, way)


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


def build(studio: Studio) -> None:
    """The page."""
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("Try one of these, or write your own:")
            with gr.Row():
                usual = bases.preset("shipped").unrelated[:EXAMPLES]
                tries = [(text, gr.Button(text, size="sm", min_width=130)) for text in usual]
            places = fields("generate")
            choice, rows = _adapters()
            way = gr.Radio(list(WAYS.items()), value="with", label="What to draw", elem_id="generate-way")
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=130, elem_id="generate-draw")
                stop = gr.Button("Stop", min_width=80, elem_id="generate-stop")
        with gr.Column(min_width=300):
            state = gr.Markdown(
                "Nothing is drawn yet. Write a prompt and press *Draw*, or take an example.", elem_id="generate-state"
            )
            pictures = gallery("Pictures", 2, buttons=["download", "fullscreen"], elem_id="generate-gallery")
            again = gr.Button("Use the settings of the chosen picture", size="sm", visible=False, elem_id="generate-again")
            with gr.Accordion("Use the settings of a picture on your disk", open=False):
                brought = photo("A PNG that was drawn here", height=180, elem_id="generate-brought")
    kept, chosen = gr.State(list[str]()), gr.State(0)
    buttons = [(go, None), *((button, text) for text, button in tries)]
    _wire(studio, places, (choice, rows), way, buttons, stop, (pictures, state, kept))
    _wire_settings(studio, places, (choice, rows), (pictures, again, brought), (state, kept, chosen))


def _adapters() -> tuple[gr.Dropdown, list[gr.Slider]]:
    """A list of adapters, and a slider for each that is chosen."""
    choice = gr.Dropdown(
        [], value=[], multiselect=True, max_choices=LIMITS.adapters, label="Adapters", elem_id="generate-adapters",
        info="What you have taught or brought, several at once. None: the base alone.",
    )  # fmt: skip
    rows = [
        gr.Slider(-STRONGEST, STRONGEST, value=1.0, step=0.05, label=f"Strength {i + 1}", visible=False, elem_id=f"generate-s{i}")
        for i in range(LIMITS.adapters)
    ]
    return choice, rows


def _wire(studio: Studio, places: Fields, adapters: Any, way: gr.Radio, buttons: Any, stop: gr.Button, shown: Any) -> None:
    """Drawing, and the list of adapters."""
    choice, rows = adapters
    inputs, outputs = [*places.all(), choice, way, *rows], list(shown)

    def run(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        count = len(places.all())
        names, how, strengths = given[count] or [], given[count + 1], given[count + 2 :]
        for found, told in draw(studio, studio.workspace(request), wished(*given[:count]), names, strengths, how):
            yield [found, told, [path for path, _ in found]]

    events = [places.prompt.submit(explained(run), inputs, outputs, **DRAWS)]
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
        return [*values(wish), gr.Dropdown(choices=choices, value=list(there)), *strengths, *hidden, note]

    def from_gallery(request: gr.Request, paths: list[str], index: int) -> list[Any]:
        return back(request, paths[index] if 0 <= index < len(paths) else None)

    def pick(event: gr.SelectData) -> int:
        return int(event.index)

    kept.change(lambda paths: [gr.Button(visible=bool(paths)), 0], [kept], [again, chosen], **QUIET)
    pictures.select(pick, None, [chosen], **QUIET)
    again.click(explained(from_gallery), [kept, chosen], outputs, **QUIET)
    brought.upload(explained(back), [brought], outputs, **QUIET)


PAGE = Page("Generate", "generate", "Write what to draw, and draw it with adapters: several at once, with and without.", build)
