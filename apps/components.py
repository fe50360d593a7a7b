"""Size limits for Gradio components, which decode any input before a handler runs and never discard sketches."""

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

from .context import page_error
from .limits import LIMITS
from .request_limits import UPLOAD_FOLDER
from .uploads import load_image
from .watching import WatchingBlocks
from .workspace import printable

_accept_blobs = gr.ImageEditor.accept_blobs


class AppBlocks(WatchingBlocks):
    """Blocks whose error names the field that has an invalid value; the log gets one line."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **kwargs: Any) -> Any:
        """Preprocesses the values of the components for a handler.

        Raises:
            gr.Error: a value that this page cannot send, such as text in a number field or a file uploaded elsewhere.
        """
        try:
            return await super().preprocess_data(block_fn, inputs, *rest, **kwargs)
        except gr.Error as error:
            if error.print_exception:  # Gradio's own
                raise page_error(str(error.message)) from error
            raise
        except Exception as error:
            raise page_error(await self._reason(error, block_fn, inputs, *rest, **kwargs)) from error

    async def _reason(self, error: Exception, block_fn: Any, inputs: list[Any], *rest: Any, **kwargs: Any) -> str:
        for block, value in zip(block_fn.inputs, inputs, strict=False):
            alone = copy.copy(block_fn)
            alone.inputs, alone.component_prop_inputs = [block], []
            try:
                await super().preprocess_data(alone, [value], *rest, **kwargs)
            except Exception:
                label = getattr(block, "label", None) or "A field"
                if isinstance(value, (dict, list)):
                    return f"{label}: this file was not uploaded to this page. Choose it again."
                return (
                    f"{label} is {printable(repr(value))}, which is invalid for this field. Reload the page and fill it in again."
                )
        return f"received {len(inputs)} values; expected {len(block_fn.inputs)}. Reload the page." if inputs else str(error)


def install_limits() -> None:
    """Applies the limits to every `gr.Image`, number field and canvas of this process. Idempotent.

    Uploads of each login go into a separate folder, see `request_limits`.

    `gr.Image` returns the image upright and RGB, and rejects unreadable files with a clear message. With `type="filepath"` it
    returns the path without reading the file, for `uploads`.
    """
    gr.Image.preprocess = _load_image  # type: ignore[method-assign]
    gr.Number.preprocess = gr.Slider.preprocess = _number  # type: ignore[method-assign, assignment]
    gr.ImageEditor.accept_blobs = _accept_drawing  # type: ignore[method-assign]
    App.uploaded_file_dir = property(_upload_folder, _set_cache)  # type: ignore[assignment]
    Image.MAX_IMAGE_PIXELS = LIMITS.photo_pixels  # Pillow rejects images of twice this size


def _load_image(self: gr.Image, payload: Any) -> Any:
    if payload is None:
        return None
    try:
        if not payload.path:
            raise VeneerError("the upload has no file. Upload the image again.", where="file", given=None)
        if self.type == "filepath":
            return str(payload.path)
        image = load_image(payload.path).rgb
    except VeneerError as error:
        raise page_error(str(error)) from error
    return np.asarray(image) if self.type == "numpy" else image


def _upload_folder(self: App) -> str:
    """Folder for uploads and served files: the user's upload folder during an upload, else the whole cache."""
    return str(Path(vars(self)["cache"]) / UPLOAD_FOLDER.get())


def _set_cache(self: App, folder: str) -> None:
    vars(self)["cache"] = folder


def _number(self: gr.Number | gr.Slider, payload: Any) -> float | int | None:
    """Value of a number field: an int if the step of the field is an integer, None if it is empty."""
    if payload is None:
        return None
    low, high, whole = self.minimum, self.maximum, _is_whole(self)
    kind = "a whole number" if whole else "a number"
    bounds = "" if low is None else f" from {low:g}" if high is None else f" from {low:g} to {high:g}"
    fits = isinstance(payload, (int, float)) and not isinstance(payload, bool) and math.isfinite(payload)
    fits = fits and (low is None or payload >= low) and (high is None or payload <= high)
    if not fits or (whole and payload != int(payload)):
        raise page_error(f"{self.label or 'A field'} is {printable(str(payload))}; expected {kind}{bounds}.")
    return int(payload) if whole else gr.Number.round_to_precision(payload, self.precision)


def _is_whole(field: gr.Number | gr.Slider) -> bool:
    if isinstance(field, gr.Slider):
        return float(field.step).is_integer() and float(field.minimum).is_integer()
    return field.precision == 0


@server  # type: ignore[untyped-decorator]
def _accept_drawing(self: gr.ImageEditor, data: Any) -> None:
    """Stores one part of a drawing; drops the oldest unused drawings beyond the limit."""
    index, name = str(data.data.get("index") or "null"), str(data.data["id"])
    index = "0" if index == "null" else index
    if not (index.isascii() and index.isdecimal() and len(index) < 5 and int(index) < LIMITS.layers and len(name) < 100):
        raise gr.Error(f"a sketch has at most {LIMITS.layers} layers.", print_exception=False)
    while len(self.blob_storage) >= LIMITS.sketches and name not in self.blob_storage:
        self.blob_storage.pop(next(iter(self.blob_storage)), None)
    _accept_blobs(self, data)
