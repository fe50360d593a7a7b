"""Image components: uploads, sketches, galleries, and temporary folders of generated images."""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from veneer.injection import OptionError, VeneerError
from veneer.training.data.image_io import decode

from ...limits import LIMITS
from ...uploads import load_image, photo_limits

PREFIX = "veneer-images-"
LIFETIME_SECONDS = 3600
"""How long a folder of images is kept; Gradio's cache has its own copies of displayed images."""
CANVAS = 384
"""Side of the sketch canvas in pixels; it fits a phone."""


def photo_input(label: str, **options: Any) -> gr.Image:
    """Photo upload whose handlers get a path, decoded by `load_photo` only. Update it with values, never with a new component."""
    part = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], **options)
    part.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return part


def gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    """Gallery that shows all images uncropped."""
    layout: dict[str, Any] = {"format": "png", "object_fit": "contain", "height": "auto", "elem_classes": "gallery"}
    return gr.Gallery(label=label, columns=columns, interactive=False, **layout, **options)


def sketchpad(label: str, **options: Any) -> gr.ImageEditor:
    """Sketch canvas whose handlers get bytes or a path for `load_sketch`. Update it with values, never with a new component."""
    pens: list[Any] = ["#000000", "#e53935", "#fdd835", "#43a047", "#1e88e5", "#8e24aa", "#6d4c41", "#ffffff"]
    part = gr.ImageEditor(
        label=label, type="filepath", sources=(), transforms=(), layers=False, canvas_size=(CANVAS, CANVAS), fixed_canvas=True,
        brush=gr.Brush(default_size=8, colors=pens, default_color=pens[0], color_mode="fixed"), format="png",
        placeholder="Sketch here", **options,
    )  # fmt: skip

    def whole(payload: Any) -> bytes | str | None:
        """Composite of all layers, as uploaded."""
        if payload is None:
            return None
        sent = part.blob_storage.pop(payload.id, None) if payload.id is not None else payload
        composite = sent.composite if sent else None
        path: str | None = getattr(composite, "path", None)
        return path or composite

    part.preprocess = whole  # type: ignore[method-assign, assignment]
    return part


def load_photo(path: str | Path | None) -> Image.Image:
    """Decodes an uploaded photo, upright and RGB.

    Raises:
        VeneerError: no photo was uploaded. PhotoError: not an image within the limits.
    """
    if not path:
        raise OptionError("no image was uploaded. Drop one, or choose a file.", option="picture", given=None)
    return load_image(path).rgb


def load_sketch(sketch: bytes | str | None) -> Image.Image:
    """Decodes a sketch on a white background.

    Raises:
        VeneerError: the sketch is empty. PhotoError: not an image, or larger than the canvas can be.
    """
    if not sketch:
        raise VeneerError("the sketch is empty. Add some lines first.", where="sketch", given="empty")
    data = sketch if isinstance(sketch, (bytes, bytearray)) else _read_bounded(Path(sketch))
    bounds = replace(photo_limits(), max_pixels=LIMITS.side**2 * 4, max_bytes=LIMITS.photo_bytes)
    try:
        return decode(bytes(data), "the sketch", bounds, remarks=False).rgb
    except VeneerError as error:
        if error.given == "transparent":
            raise VeneerError("the sketch is empty. Add some lines first.", where="sketch", given="empty") from error
        raise


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(LIMITS.photo_bytes + 1)
    if len(data) > LIMITS.photo_bytes:
        message = f"the sketch has more than {LIMITS.photo_bytes:,} bytes. Sketch it again."
        raise VeneerError(message, where="photo_bytes", expected=LIMITS.photo_bytes)
    return data


def inline_image(image: Image.Image, alt: str, side: int = 384) -> str:
    """HTML of an image with its data in it, no larger than `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", quality=88)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" width="{small.width}" height="{small.height}">'


def new_folder() -> Path:
    """Creates a folder for the images of one request, and deletes expired ones."""
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - old.stat().st_mtime > LIFETIME_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        except OSError:
            continue  # another request has deleted it
    return Path(tempfile.mkdtemp(prefix=PREFIX))
