"""Gradio's own components bounded: they decode whatever came before a handler sees it, and keep drawings without end."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from gradio.routes import App
from PIL import Image

from veneer.injection import VeneerError

from .context import refusal
from .limits import LIMITS
from .request_limits import PLACE
from .uploads import picture
from .workspace import shown

_keep = gr.ImageEditor.accept_blobs


class Page(gr.Blocks):
    """Blocks that say which field has an unusable value, and log it in one line."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> Any:
        """Values of the components, as a handler gets them.

        Raises:
            gr.Error: a value that no browser sends from this page, such as text in a number field or a file of elsewhere.
        """
        try:
            return await super().preprocess_data(block_fn, inputs, *rest, **named)
        except gr.Error as error:
            if error.print_exception:  # Gradio's own
                raise refusal(str(error.message)) from error
            raise
        except Exception as error:
            raise refusal(await self._reason(error, block_fn, inputs, *rest, **named)) from error

    async def _reason(self, error: Exception, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> str:
        for block, value in zip(block_fn.inputs, inputs, strict=False):
            alone = copy.copy(block_fn)
            alone.inputs, alone.component_prop_inputs = [block], []
            try:
                await super().preprocess_data(alone, [value], *rest, **named)
            except Exception:
                label = getattr(block, "label", None) or "A field"
                if isinstance(value, (dict, list)):
                    return f"{label}: this file was not uploaded to this page. Choose it again."
                return f"{label} is {shown(repr(value))}, which this field cannot have. Reload the page, and fill it in again."
        return f"{len(inputs)} values came; expected {len(block_fn.inputs)}. Reload the page." if inputs else str(error)


def bound() -> None:
    """Let every `gr.Image`, number field and canvas of this process keep to the limits. A second call changes nothing.

    Uploads of each login go into a folder of their own, see `guard`.

    A `gr.Image` gives the picture upright and RGB; one that cannot be read is refused with a readable message. With
    `type="filepath"` it gives the file unread, for `uploads`.
    """
    gr.Image.preprocess = _given  # type: ignore[method-assign]
    gr.Number.preprocess = gr.Slider.preprocess = _number  # type: ignore[method-assign, assignment]
    gr.ImageEditor.accept_blobs = _drawn  # type: ignore[method-assign]
    App.uploaded_file_dir = property(_uploads, _set_cache)  # type: ignore[assignment]
    Image.MAX_IMAGE_PIXELS = LIMITS.photo_pixels  # Pillow refuses what is twice as large


def _given(self: gr.Image, payload: Any) -> Any:
    if payload is None:
        return None
    try:
        if not payload.path:
            raise VeneerError("no picture came; expected a file. Bring it again.", where="file", given=None)
        if self.type == "filepath":
            return str(payload.path)
        found = picture(payload.path).rgb
    except VeneerError as error:
        raise refusal(str(error)) from error
    return np.asarray(found) if self.type == "numpy" else found


def _uploads(self: App) -> str:
    """Where uploads go and from where files are served: the visitor's own folder for an upload, else the whole cache."""
    return str(Path(vars(self)["cache"]) / PLACE.get())


def _set_cache(self: App, folder: str) -> None:
    vars(self)["cache"] = folder


def _number(self: gr.Number | gr.Slider, payload: Any) -> float | int | None:
    """The number of a field, whole where the field's step is whole; None for an empty one."""
    if payload is None:
        return None
    low, high, whole = self.minimum, self.maximum, _is_whole(self)
    kind = "a whole number" if whole else "a number"
    bounds = "" if low is None else f" from {low:g}" if high is None else f" from {low:g} to {high:g}"
    fits = isinstance(payload, (int, float)) and not isinstance(payload, bool) and math.isfinite(payload)
    fits = fits and (low is None or payload >= low) and (high is None or payload <= high)
    if not fits or (whole and payload != int(payload)):
        raise refusal(f"{self.label or 'A field'} is {shown(str(payload))}; expected {kind}{bounds}.")
    return int(payload) if whole else gr.Number.round_to_precision(payload, self.precision)


def _is_whole(field: gr.Number | gr.Slider) -> bool:
    if isinstance(field, gr.Slider):
        return float(field.step).is_integer() and float(field.minimum).is_integer()
    return field.precision == 0


@server  # type: ignore[untyped-decorator]
def _drawn(self: gr.ImageEditor, data: Any) -> None:
    """One part of a drawing. Of drawings that are sent and never used, the oldest go."""
    index, name = str(data.data.get("index") or "null"), str(data.data["id"])
    index = "0" if index == "null" else index
    if not (index.isascii() and index.isdecimal() and len(index) < 5 and int(index) < LIMITS.layers and len(name) < 100):
        raise gr.Error(f"a drawing has at most {LIMITS.layers} layers.", print_exception=False)
    while len(self.blob_storage) >= LIMITS.drawings and name not in self.blob_storage:
        self.blob_storage.pop(next(iter(self.blob_storage)), None)
    _keep(self, data)
