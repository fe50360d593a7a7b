"""Field that adds an adapter from the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ...limits import LIMITS
from ...workspace import Workspace
from ..shared.events import FILES
from ..shared.html import note
from .files import store_download


class HubFields:
    """A name on the hub, and the button that downloads the adapter."""

    def __init__(self) -> None:
        with gr.Accordion("Add from the hub", open=False):
            self.name = gr.Textbox(
                label="Name on the hub", placeholder="user/repo or user/repo/file.safetensors", max_length=LIMITS.text,
                elem_id="adapter-hub",
            )  # fmt: skip
            self.add = gr.Button("Add", size="sm", elem_id="adapter-hub-add")

    def connect(self, handler: Callable[[Any], Any], refresh: Callable[..., list[Any]], outputs: Sequence[Any]) -> None:
        """Connects the button.

        Args:
            handler: makes an event handler of a function of the workspace. `refresh`: values of the lists of adapters, as
                `refresh_list`. `outputs`: the lists, and the note.
        """

        def add(workspace: Workspace, name: str) -> list[Any]:
            stem = store_download(workspace, name)
            return [*refresh(workspace, stem, None), note(f"Downloaded as {stem}.", "good")]

        self.add.click(handler(add), self.name, [*outputs], **FILES)
