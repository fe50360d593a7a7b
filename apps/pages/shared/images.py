"""Pictures that visitors bring or draw, and files of pictures that they get."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from veneer.injection import OptionError, VeneerError
from veneer.training.data.image_io import decode

from ...limits import LIMITS
from ...uploads import photo_limits, picture

PREFIX = "veneer-pictures-"
KEPT_SECONDS = 3600
"""How long a folder of pictures is kept here; what is shown lies in Gradio's cache by then."""
CANVAS = 384
"""Side of the sheet that is drawn on, in pixels; it fits a phone."""


def photo(label: str, **options: Any) -> gr.Image:
    """A place for a photo, which nobody opens before `seen`. Its handlers get a path; send it values, never a new component."""
    part = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], **options)
    part.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return part


def gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    """Pictures that are seen whole, as many as there are."""
    kept: dict[str, Any] = {"format": "png", "object_fit": "contain", "height": "auto", "elem_classes": "gallery"}
    return gr.Gallery(label=label, columns=columns, interactive=False, **kept, **options)


def sketchpad(label: str, **options: Any) -> gr.ImageEditor:
    """A sheet to draw on. Its handlers get bytes or a path for `sketched`; send it values, never a new component."""
    pens: list[Any] = ["#000000", "#e53935", "#fdd835", "#43a047", "#1e88e5", "#8e24aa", "#6d4c41", "#ffffff"]
    part = gr.ImageEditor(
        label=label, type="filepath", sources=(), transforms=(), layers=False, canvas_size=(CANVAS, CANVAS), fixed_canvas=True,
        brush=gr.Brush(default_size=8, colors=pens, default_color=pens[0], color_mode="fixed"), format="png",
        placeholder="Draw here", **options,
    )  # fmt: skip

    def whole(payload: Any) -> bytes | str | None:
        """What was drawn, all layers together, as it was sent."""
        if payload is None:
            return None
        sent = part.blob_storage.pop(payload.id, None) if payload.id is not None else payload
        found = sent.composite if sent else None
        path: str | None = getattr(found, "path", None)
        return path or found

    part.preprocess = whole  # type: ignore[method-assign, assignment]
    return part


def seen(path: str | Path | None) -> Image.Image:
    """A photo of a visitor, upright and RGB.

    Raises:
        VeneerError: none was given. PhotoError: it is no picture within the limits.
    """
    if not path:
        raise OptionError("there is no picture yet. Drop one, or choose a file.", option="picture", given=None)
    return picture(path).rgb


def sketched(given: bytes | str | None) -> Image.Image:
    """A sketch of a visitor on white.

    Raises:
        VeneerError: none was given. PhotoError: it is no picture, or larger than a sheet can be.
    """
    if not given:
        raise VeneerError("the sketch is empty. Draw some lines first.", where="sketch", given="empty")
    data = given if isinstance(given, (bytes, bytearray)) else _short(Path(given))
    bounds = replace(photo_limits(), max_pixels=LIMITS.side**2 * 4, max_bytes=LIMITS.photo_bytes)
    try:
        return decode(bytes(data), "the sketch", bounds, remarks=False).rgb
    except VeneerError as error:
        if error.given == "transparent":
            raise VeneerError("the sketch is empty. Draw some lines first.", where="sketch", given="empty") from error
        raise


def _short(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(LIMITS.photo_bytes + 1)
    if len(data) > LIMITS.photo_bytes:
        message = f"the sketch has more than {LIMITS.photo_bytes:,} bytes. Draw it anew."
        raise VeneerError(message, where="photo_bytes", expected=LIMITS.photo_bytes)
    return data


def new_folder() -> Path:
    """A folder for pictures of one request. Those of an hour ago are deleted."""
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        except OSError:
            continue  # another request has deleted it
    return Path(tempfile.mkdtemp(prefix=PREFIX))
