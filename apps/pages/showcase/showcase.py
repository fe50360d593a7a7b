"""Cards of the three tasks: images of the bundled models, and a button that starts the task on bundled examples.

The images in `images/` are of `veneer personalize --concept "<octopus>" --class-word toy --steps 300` on the example photos, and
of the ControlNet of `docs/results`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from veneer import base_models

from ..shared.events import QUIET
from ..shared.example_images import digit_images
from ..shared.images import inline_image

IMAGES = Path(__file__).with_name("images")
SUBJECT_PROMPTS = ("center, white background", "center, pink background", "left, green background")
CONTROLLED = ("mushroom", "carrot", "cheese")


@dataclass(frozen=True)
class Showcase:
    """Components of the first screen.

    Args:
        column: the whole of it. `train`: button that trains on the example photos.
        others: slug of a page to the button that opens it and starts its task.
    """

    column: Any
    train: Any
    others: dict[str, Any]


def showcase() -> Showcase:
    """Creates the cards."""
    with gr.Column(elem_id="showcase") as column:
        with gr.Column(elem_classes="card"):
            gr.HTML(subject_card())
            train = gr.Button("Train on these photos", size="md", elem_id="showcase-train")
        with gr.Row():
            with gr.Column(elem_classes="card", min_width=260):
                gr.HTML(control_card())
                control = gr.Button("Train a ControlNet", size="md", elem_id="showcase-control")
            with gr.Column(elem_classes="card", min_width=260):
                gr.HTML(classify_card())
                classify = gr.Button("Train a classifier", size="md", elem_id="showcase-classify")
    return Showcase(column, train, {"control": control, "classify": classify})


def connect_showcase(tabs: gr.Tabs, cards: Showcase) -> None:
    """Connects the buttons of other pages: each opens its page and presses the page's button *Train*."""
    starts = {"control": "control-train-start", "classify": "classify-start"}
    for slug, button in cards.others.items():
        event = button.click(lambda slug=slug: gr.Tabs(selected=slug), None, tabs, **QUIET)
        event.then(None, js=f"() => pressWhenReady('{starts[slug]}')", **QUIET)


@functools.cache
def subject_card() -> str:
    """The example photos, and images of the base model and of the trained adapter for the same prompts."""
    photos = [_open(path) for path in sorted(base_models.examples().glob("*.png"))]
    before, after = ([_open(IMAGES / f"subject-{kind}-{i}.webp") for i in range(3)] for kind in ("before", "after"))
    parts = [
        _figure(photos, "5 photos of a toy", "small"),
        _figure(before, "Before: the bundled model", "large", SUBJECT_PROMPTS),
        _figure(after, "After 300 steps, minutes on a CPU", "large", SUBJECT_PROMPTS),
    ]
    return _card("Your subject or style, from a few photos", "Train, then place it in new images by a prompt.", _group(parts))


@functools.cache
def subject_strip() -> str:
    """Two of the example photos and two images with the trained adapter, for the top of a narrow window."""
    photos = [_open(path) for path in sorted(base_models.examples().glob("*.png"))][:2]
    after = [_open(IMAGES / f"subject-after-{i}.webp") for i in range(2)]
    parts = [_figure(photos, "A few photos", ""), _figure(after, "Images by prompt", "")]
    return f'<div class="images narrow">{"".join(parts)}</div>'


@functools.cache
def prompt_examples() -> str:
    """Images of the bundled model for the example prompts of the page Generate."""
    prompts = base_models.preset("bundled").unrelated[:4]
    images = [_open(IMAGES / f"example-{i}.webp") for i in range(len(prompts))]
    return f'<div class="images">{_figure(images, "The four examples, by the bundled model, seed 0", "large", prompts)}</div>'


@functools.cache
def control_examples() -> str:
    """Maps of edges and the images that follow them."""
    maps, images = ([_open(IMAGES / f"control-{name}-{kind}.webp") for name in CONTROLLED] for kind in ("map", "image"))
    parts = [_figure(maps, "Lines", "", CONTROLLED), _figure(images, "Images that follow them", "", CONTROLLED)]
    return _group(parts)


def control_card() -> str:
    """What a control adapter does."""
    return _card("Images that follow a sketch", "A ControlNet for edges, depth, poses and more.", control_examples())


@functools.cache
def classify_card() -> str:
    """The built-in digits with their classes."""
    parts = [_figure(digit_images(), "Built in: 1,797 images in ten classes", "tiny", [str(n) for n in range(10)])]
    return _card("An image classifier", "Compare methods on labeled images, with accuracy and mistakes.", _group(parts))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _card(title: str, about: str, images: str) -> str:
    return f'<h3>{escape(title)}</h3><p class="about">{escape(about)}</p>{images}'


def _group(figures: Sequence[str]) -> str:
    return f'<div class="images">{"".join(figures)}</div>'


def _figure(images: Sequence[Image.Image], caption: str, kind: str, names: Sequence[str] = ()) -> str:
    """A row of images with a caption below; `kind`: CSS class of their size."""
    content = "".join(
        inline_image(ImageOps.fit(image, (192, 192)), f"{caption}: {names[i] if i < len(names) else i + 1}")
        for i, image in enumerate(images)
    )
    return f'<figure class="{kind}"><div class="row">{content}</div><figcaption>{escape(caption)}</figcaption></figure>'
