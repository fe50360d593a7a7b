"""Gradio's own components bounded: they decode whatever came before a handler sees it, and keep drawings without end."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from PIL import Image

from veneer.injection import VeneerError

from .limits import LIMITS
from .studio import escaped
from .uploads import picture

_keep = gr.ImageEditor.accept_blobs


def bound() -> None:
    """Let every `gr.Image` and every canvas of this process keep to the limits. A second call changes nothing.

    A `gr.Image` gives the picture upright and RGB; one that cannot be read is refused with a readable message. With
    `type="filepath"` it gives the file unread, for `uploads`.
    """
    gr.Image.preprocess = _given  # type: ignore[method-assign]
    gr.ImageEditor.accept_blobs = _drawn  # type: ignore[method-assign]
    Image.MAX_IMAGE_PIXELS = LIMITS.photo_pixels  # Pillow refuses what is twice as large


def _given(self: gr.Image, payload: Any) -> Any:
    if payload is None:
        return None
    try:
        if not payload.path:
            raise VeneerError("no picture came; expected a file. Bring it again.")
        if self.type == "filepath":
            return str(payload.path)
        found = picture(payload.path).rgb
    except VeneerError as error:
        raise gr.Error(escaped(str(error)), duration=None, print_exception=False) from error
    return np.asarray(found) if self.type == "numpy" else found


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
