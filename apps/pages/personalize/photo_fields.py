"""Values of the photo fields: thumbnails, crops, problems and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from veneer import base_models
from veneer.training.concepts.concept import DEMO

from ...context import escape_markup
from ...limits import LIMITS
from ..shared.photo_upload import example_photos, inspect_photos
from .request import check_base

NO_PHOTOS = f"Drop your photos (at most {LIMITS.photos}), or use the example photos."
FALLBACK_SIDE = 512
"""Resolution in pixels for crops if the base model does not state one."""


def show_photos(paths: Sequence[str] | None, base: str, captions: Sequence[str] = ()) -> list[Any]:
    """Updates of thumbnails, crops, problems in Markdown, the part with captions, and its table for uploaded photos."""
    if not paths:
        return [gr.Gallery([], visible=False), gr.Gallery([]), NO_PHOTOS, gr.Accordion(visible=False), gr.Dataframe([])]
    side = base_models.preset(check_base(base)).resolution or FALLBACK_SIDE
    report = inspect_photos(paths, side)
    rows = [[name, caption] for name, caption in zip(report.names, [*captions, *[""] * len(report.names)], strict=False)]
    count = f"{len(report.names)} photo{'s' * (len(report.names) != 1)}"
    problems = "\n".join(f"- ⚠ {escape_markup(text)}" for text in report.problems)
    crops = gr.Gallery(report.crops, label=f"As square crops of {side} × {side} pixels, as the base model is trained on them")
    thumbs = gr.Gallery(list(zip(report.thumbnails, report.names, strict=True)), visible=True)
    note = f"{count}.\n\n{problems}" if problems else f"{count}, no problems found."
    return [thumbs, crops, note, gr.Accordion(visible=True), gr.Dataframe(rows)]


def show_example(base: str) -> list[Any]:
    """Example photos, concept and class word, and the updates of `show_photos`."""
    paths, captions = example_photos()
    return [paths, DEMO["concept"], DEMO["class_word"], *show_photos(paths, base, captions)]
