"""Form fields of image generation that pages share: base model, prompt, seed and others."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import gradio as gr

from ...context import show_errors
from ...limits import LIMITS
from .events import QUIET
from .generation_request import GenerationRequest, defaults

SEEDS = 2**31


@dataclass(frozen=True)
class Fields:
    """Components, in the order of the arguments of `parse_request`."""

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
        """Components as inputs of a handler."""
        return [self.base, self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height, self.count]


def fields(page: str, prompt: str = "", below: Callable[[], None] = lambda: None) -> Fields:
    """Creates the fields, with the defaults of the bundled base model.

    Args:
        page: prefix of the element IDs. `below`: creates the components below the prompt.
    """
    steps, guidance, negative, side = defaults("bundled")
    prompt_box = gr.Textbox(
        prompt, label="Prompt", lines=2, max_length=LIMITS.text, elem_id=f"{page}-prompt", placeholder="What to generate",
        info="The bundled model knows a hundred objects as icons, and photos of clothes: a small cat, left, blue background.",
    )  # fmt: skip
    below()
    with gr.Row():
        with gr.Column(min_width=110):
            seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, elem_id=f"{page}-seed", info="The same seed gives the same image."
            )
            dice = gr.Button("Random seed", size="sm", elem_id=f"{page}-dice")
        count = gr.Slider(1, LIMITS.images, value=1, step=1, label="Images", min_width=150, elem_id=f"{page}-count")
    with gr.Accordion("More settings", open=False):
        base = gr.Dropdown(
            ["bundled"], value="bundled", label="Base model", allow_custom_value=True, elem_id=f"{page}-base",
            info="bundled (the bundled model), a folder on this machine, or a name on the Hugging Face Hub.",
        )  # fmt: skip
        negative_box = gr.Textbox(
            negative, label="Negative prompt", max_length=LIMITS.text, info="What the images should not show."
        )
        steps_box = gr.Slider(
            1, LIMITS.steps, value=steps, step=1, label="Steps", info="Sampling steps: more give finer images and take longer."
        )
        guidance_box = gr.Slider(
            0, 30, value=guidance, step=0.5, label="Guidance scale", info="How closely the images follow the prompt."
        )
        with gr.Row():
            width, height = (
                gr.Number(side, label=f"{name} in pixels", precision=0, minimum=0, maximum=LIMITS.side, min_width=130)
                for name in ("Width", "Height")
            )
        gr.Markdown("A size of 0 means the native resolution of the base model.", elem_classes="about")
    fields_ = Fields(base, prompt_box, negative_box, seed, steps_box, guidance_box, width, height, count)
    dice.click(lambda: secrets.randbelow(SEEDS), None, [seed], **QUIET)
    base.input(show_errors(base_defaults), [base], [steps_box, guidance_box, negative_box, width, height], **QUIET)
    return fields_


def base_defaults(base: str) -> list[Any]:
    """Defaults of a base model: steps, guidance scale, negative prompt, width and height.

    Raises:
        VeneerError: unknown base model.
    """
    steps, guidance, negative, side = defaults(base)
    return [steps, guidance, negative, side, side]


def values(generation: GenerationRequest) -> list[Any]:
    """Values of the fields for a request, in their order."""
    base, prompt, negative, seed, steps, guidance, size, count = astuple(generation)
    height, width = size or (0, 0)
    return [base, prompt, negative, seed, steps, guidance, width, height, count]
