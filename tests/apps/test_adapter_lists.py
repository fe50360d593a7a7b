"""Lists of adapters update automatically; adapters that a run was trained on top of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from safetensors.torch import save_file
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.jobs import create_job
from veneer.apps.pages.generate.generate_page import form_for_job
from veneer.apps.pages.personalize.adapter_sources import select_sources
from veneer.apps.pages.personalize.request import command
from veneer.apps.pages.shared.adapter_lists import fixed_adapters, refresh_on_change
from veneer.apps.pages.shared.job_view import ADAPTER

from tests.apps.test_personalize_config import request


def test_list_updates_only_when_adapters_change(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    here = context.workspace(None)
    here.adapters.mkdir(parents=True)
    (here.adapters / "a.safetensors").touch()
    with AppBlocks() as page:
        choice = gr.Dropdown([], label="Adapters", allow_custom_value=True)
        refresh_on_change(context, [choice], lambda workspace, chosen: [f"{chosen} of {len(workspace.all_adapters())}"], choice)
    first, news, _ = (event.fn for event in page.fns.values())
    assert first is not None
    assert news is not None
    opened: list[Any] = first(None, "a")
    assert opened == ["a of 1", ["a"]]
    assert news(None, "a", opened[-1]) == [gr.skip()] * 2, "a list that is open stays as it is"
    (here.adapters / "b.safetensors").touch()
    assert news(None, "a", opened[-1]) == ["a of 2", ["a", "b"]]
    (here.adapters / "a.safetensors").unlink()
    assert news(None, "a", ["a", "b"]) == ["a of 1", ["b"]]


def test_adapters_below_a_run_are_selected_with_it(tmp_path: Path) -> None:
    """On the page Generate, with the strengths that they had in training; those that are deleted are left out."""
    workspace = Context.create(tmp_path).workspace(None)
    workspace.adapters.mkdir(parents=True)
    for name in ("gone", "oil", "toy"):
        save_file({"unet.conv": torch.zeros(1)}, workspace.adapters / f"{name}.safetensors")
    form = request(sources=select_sources(workspace, None, ["oil", "gone"], [0.5, 1]))
    job = create_job(workspace.jobs, "train", "toy", command(form, tmp_path))
    job.run.mkdir()
    shutil.copyfile(workspace.adapters / "toy.safetensors", job.run / ADAPTER)
    (workspace.adapters / "gone.safetensors").unlink()
    assert fixed_adapters(workspace, job) == {"oil": 0.5}
    _, prompt, *_, choice, first, second, third = form_for_job(workspace, job)[: 9 + 1 + 3]
    assert "<toy>" in prompt
    assert choice.value == ["oil", next(iter(workspace.all_adapters()))]
    assert [slider.visible for slider in (first, second, third)] == [True, True, False]
    assert (first.value, second.value) == (0.5, 1)
    assert fixed_adapters(workspace, create_job(workspace.jobs, "train", "toy", command(request(), tmp_path))) == {}
