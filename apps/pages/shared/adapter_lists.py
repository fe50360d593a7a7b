"""Lists of a visitor's adapters that know of a new one by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ...context import Studio, explained
from ...workspace import Workspace
from .events import QUIET

SECONDS = 5.0
"""Between two looks whether a job, another page or another tab has made an adapter."""


def follow(
    studio: Studio, parts: Sequence[Any], values: Callable[[Workspace, Any], Sequence[Any]], chosen: Any, every: float = SECONDS
) -> None:
    """Give `parts` new values when the page is opened and whenever the visitor's adapters have changed. Between
    changes nothing is sent, so that a list that somebody has open stays as it is.

    Args:
        values: of the parts, for a workspace and the value of `chosen`, such as the list itself.
    """
    known = gr.State(list[str]())

    def news(request: gr.Request, name: Any, before: list[str] | None) -> list[Any]:
        workspace = studio.workspace(request)
        names = [*workspace.all_adapters()]
        return [gr.skip()] * (len(parts) + 1) if names == before else [*values(workspace, name), names]

    def first(request: gr.Request, name: Any) -> list[Any]:
        return news(request, name, None)

    gr.on(None, explained(first), [chosen], [*parts, known], **QUIET)
    gr.Timer(every).tick(explained(news), [chosen, known], [*parts, known], **QUIET)
