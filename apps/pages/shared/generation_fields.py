"""The fields of a drawing that pages share: base, prompt, seed and the rest."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import gradio as gr

from ...context import explained
from ...limits import LIMITS
from .events import QUIET
from .generation_request import Wish, defaults

SEEDS = 2**31


@dataclass(frozen=True)
class Fields:
    """Components, in the order in which `wished` takes their values."""

    base: Any
    prompt: Any
    negative: Any
    seed: Any
    steps: Any
    guidance: Any
    width: Any
    height: Any
    count: Any

    def all(self) -> list[Any]:
        """Inputs of a handler."""
        return [self.base, self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height, self.count]


def fields(page: str, prompt: str = "", below: Callable[[], None] = lambda: None) -> Fields:
    """The fields, with what suits the bundled base.

    Args:
        page: the start of their names in the page's HTML. `below`: makes what stands below the prompt.
    """
    steps, guidance, negative, side = defaults("bundled")
    words = gr.Textbox(
        prompt, label="Prompt", lines=2, max_length=LIMITS.text, elem_id=f"{page}-prompt", placeholder="What to generate",
        info="The bundled base knows a hundred things on plain grounds, such as: a small cat, left, blue background.",
    )  # fmt: skip
    below()
    with gr.Row():
        with gr.Column(min_width=110):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{page}-seed", info="Same seed, same image.")
            dice = gr.Button("Another seed", size="sm", elem_id=f"{page}-dice")
        count = gr.Slider(1, LIMITS.pictures, value=1, step=1, label="Images", min_width=150, elem_id=f"{page}-count")
    with gr.Accordion("More settings", open=False):
        base = gr.Dropdown(
            ["bundled"], value="bundled", label="Base", allow_custom_value=True, elem_id=f"{page}-base",
            info="The model that generates: bundled, a folder of this machine, or a name on the hub.",
        )  # fmt: skip
        unwanted = gr.Textbox(negative, label="Negative prompt", max_length=LIMITS.text, info="What to keep away from.")
        stride = gr.Slider(1, LIMITS.steps, value=steps, step=1, label="Steps", info="More are finer and slower.")
        guide = gr.Slider(0, 30, value=guidance, step=0.5, label="Guidance", info="How closely the prompt is followed.")
        with gr.Row():
            width, height = (
                gr.Number(side, label=f"{name} in pixels", precision=0, minimum=0, maximum=LIMITS.side, min_width=130)
                for name in ("Width", "Height")
            )
        gr.Markdown("A size of 0 is the base's own.", elem_classes="about")
    found = Fields(base, words, unwanted, seed, stride, guide, width, height, count)
    dice.click(lambda: secrets.randbelow(SEEDS), None, [seed], **QUIET)
    base.input(explained(suited), [base], [stride, guide, unwanted, width, height], **QUIET)
    return found


def suited(base: str) -> list[Any]:
    """What suits a base: steps, guidance, negative prompt, width and height.

    Raises:
        VeneerError: no such base.
    """
    steps, guidance, negative, side = defaults(base)
    return [steps, guidance, negative, side, side]


def values(wish: Wish) -> list[Any]:
    """Values of the fields for a wish, in their order."""
    base, prompt, negative, seed, steps, guidance, size, count = astuple(wish)
    height, width = size or (0, 0)
    return [base, prompt, negative, seed, steps, guidance, width, height, count]
