"""Limits of Gradio components."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.components.image_editor import EditorData, EditorDataBlobs
from veneer.apps import components
from veneer.apps.limits import LIMITS
from veneer.apps.pages.shared.images import sketchpad


class Canvas:
    """A sketch component."""

    def __init__(self) -> None:
        self.blob_storage: dict[str, dict[str, object]] = {}

    def send(self, name: str, index: object = "0") -> None:
        data = {"id": name, "type": "layer", "index": index}
        components._accept_drawing(self, SimpleNamespace(data=data, files=[("x", b"x")]))


def test_drawings_are_limited() -> None:
    canvas = Canvas()
    for wrong in ("1000000000000", "-1", "8", "x", "²"):
        with pytest.raises(gr.Error, match=str(LIMITS.layers)):
            canvas.send("a", wrong)
    with pytest.raises(gr.Error):
        canvas.send("x" * 100)
    assert not canvas.blob_storage
    names = [str(n) for n in range(LIMITS.sketches + 10)]
    for name in names:
        canvas.send(name)
    assert list(canvas.blob_storage) == names[10:], "the oldest go"
    canvas.send(names[-1], "1")
    assert list(canvas.blob_storage) == names[10:], "another layer of one that is there takes no place"


def test_used_drawing_frees_its_storage() -> None:
    pad = sketchpad("Sketch")
    pad.blob_storage["a"] = EditorDataBlobs(background=None, layers=[], composite=b"drawn")
    sent = EditorData(id="a")
    assert pad.preprocess(sent) == b"drawn"
    assert pad.blob_storage == {}
    assert pad.preprocess(sent) is None
    assert pad.preprocess(None) is None
