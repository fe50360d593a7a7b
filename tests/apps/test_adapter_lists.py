"""Lists of adapters update automatically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from veneer.apps.context import Context
from veneer.apps.pages.shared.adapter_lists import refresh_on_change


def test_list_updates_only_when_adapters_change(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    here = context.workspace(None)
    here.adapters.mkdir(parents=True)
    (here.adapters / "a.safetensors").touch()
    with gr.Blocks() as page:
        choice = gr.Dropdown([], label="Adapters", allow_custom_value=True)
        refresh_on_change(context, [choice], lambda workspace, chosen: [f"{chosen} of {len(workspace.all_adapters())}"], choice)
    first, news = (event.fn for event in page.fns.values())
    assert first is not None
    assert news is not None
    opened: list[Any] = first(None, "a")
    assert opened == ["a of 1", ["a"]]
    assert news(None, "a", opened[-1]) == [gr.skip()] * 2, "a list that is open stays as it is"
    (here.adapters / "b.safetensors").touch()
    assert news(None, "a", opened[-1]) == ["a of 2", ["a", "b"]]
    (here.adapters / "a.safetensors").unlink()
    assert news(None, "a", ["a", "b"]) == ["a of 1", ["b"]]
