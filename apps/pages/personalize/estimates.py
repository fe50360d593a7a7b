"""Estimates of time and memory on the page Train, as text and in the labels of presets."""

from __future__ import annotations

from typing import Any

import gradio as gr

from veneer.injection import VeneerError

from ...context import escape_markup
from ...workspace import Workspace
from .request import estimate, preset_choices


def estimate_text(workspace: Workspace | None, *args: str, **kwargs: str) -> str:
    """Estimate in Markdown (see `estimate`); empty while the base model is incomplete or unknown."""
    try:
        return escape_markup(estimate(workspace, *args, **kwargs))
    except VeneerError:
        return ""


def preset_radio(workspace: Workspace, base: str, method: str) -> Any:
    """Presets with time estimates; unchanged while the base model or method is incomplete or unknown."""
    try:
        return gr.Radio(choices=preset_choices(base, method, workspace))
    except VeneerError:
        return gr.skip()
