"""Lists of adapters that update automatically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.training.fixed_adapters import split_strength

from ...context import Context, show_errors
from ...jobs import Job
from ...watching import watch
from ...workspace import Workspace
from .events import QUIET


def fixed_adapters(workspace: Workspace, job: Job) -> dict[str, float]:
    """Adapters that a run was trained on top of: name to strength. Those that the user deleted are left out."""
    if "--with" not in job.command:
        return {}
    words = takewhile(lambda word: not word.startswith("--"), job.command[job.command.index("--with") + 1 :])
    strength_of = {Path(path): strength for path, strength in map(split_strength, words)}
    return {name: strength_of[file] for name, file in workspace.all_adapters().items() if file in strength_of}


def watch_adapters(context: Context) -> gr.Textbox:
    """A field that changes with the user's adapters: by jobs, other pages and other tabs."""
    return watch("adapters", lambda request: [*context.workspace(request).all_adapters()])


def refresh_on_change(
    context: Context, parts: Sequence[Any], values: Callable[[Workspace, Any], Sequence[Any]], chosen: Any
) -> None:
    """Updates `parts` when the page is opened and whenever the user's adapters change.

    Without a change nothing is sent, so that an open dropdown stays open.

    Args:
        values: new values of the parts for a workspace and the value of `chosen`, such as the list itself.
    """
    known_names = gr.State(list[str]())

    def refresh(request: gr.Request, name: Any, previous: list[str] | None) -> list[Any]:
        workspace = context.workspace(request)
        names = [*workspace.all_adapters()]
        return [gr.skip()] * (len(parts) + 1) if names == previous else [*values(workspace, name), names]

    def load(request: gr.Request, name: Any) -> list[Any]:
        return refresh(request, name, None)

    gr.on(None, show_errors(load), [chosen], [*parts, known_names], **QUIET)
    watch_adapters(context).change(show_errors(refresh), [chosen, known_names], [*parts, known_names], **QUIET)
