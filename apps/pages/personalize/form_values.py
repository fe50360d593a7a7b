"""Values of the settings and method options in the form."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from veneer import methods
from veneer.injection import VeneerError

from ...context import escape_markup
from ...workspace import printable
from ..shared.config_form import Slots
from .request import check_base, default_options, main_method, options_of, preset_settings

PRESET_FIELDS = ("steps", "batch", "learning_rate", "schedule", "seed", "preview_every", "checkpoint_every", "eval_seeds")
"""Settings that depend on the preset."""


def fill_form(slots: Slots, preset: str, base: str, method: str) -> list[Any]:
    """Settings of a preset, the summary of the selected method, and the form of its options."""
    settings = preset_settings(preset, base, method)
    return [
        *(settings[name] for name in PRESET_FIELDS),
        method_summary(method),
        *slots.fill(options_of(method), default_options(base, method)),
    ]


def method_summary(method: str) -> str:
    """Summary of the method whose options are shown, in Markdown: what it does, and its formula."""
    name = main_method(method)
    kind = methods.get(name)
    formula = (inspect.getdoc(kind) or "").split("\n")[0]
    title = (inspect.getdoc(sys.modules[kind.__module__]) or formula).split("\n")[0]
    lines = dict.fromkeys((f"**{escape_markup(name)}** {escape_markup(title)}", escape_markup(formula)))
    return "\n\n".join(lines) + ("" if options_of(method) else " It has no options.")


def check_form_is_current(filled_for: Sequence[str], now: Sequence[str]) -> None:
    """Checks that the form has been filled for the selected preset, base model and method.

    Raises:
        VeneerError: the form is still loading, or the base model or method is unknown.
    """
    if list(filled_for) != list(now):
        preset, base, method = now
        check_base(base)
        main_method(method)
        raise VeneerError(
            f"the settings for {preset}, {printable(method)} and {printable(base)} are still loading. Press again in a moment.",
            where="settings",
            given=tuple(filled_for),
            expected=tuple(now),
        )
