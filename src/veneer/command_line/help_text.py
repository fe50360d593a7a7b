"""Help texts of flags: placeholders of values, names of other flags, defaults, and the layout of the page."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACEHOLDERS = {
    "auth": "NAME:PASSWORD", "base": "MODEL", "check": "SIZE", "class_word": "WORD", "concept": "TOKEN",
    "distance": "SOURCE=TARGET", "features": "MODEL", "host": "ADDRESS", "license": "ID", "model": "MODEL",
    "negative_prompt": "TEXT", "optimizer": "NAME", "prediction": "TYPE", "quantize": "KIND", "rows": "ROW", "schedule": "NAME",
    "template": "TEXT", "tracker": "NAME", "train": "SITES", "weights": "FILE", "where": "SITES", "with_": "FILE",
}  # fmt: skip
"""Name of a field with text to the placeholder of its values; others have the last word of their name."""
MANY_CHOICES = "NAME"
"""Placeholder of a flag whose choices are listed in its help text instead."""
WIDEST = 60
"""Largest width of choices that are listed as a placeholder."""


def placeholder(name: str, several: bool) -> str:
    """Placeholder of the text values of a field; of a plural its singular."""
    last = name.rstrip("_").rpartition("_")[2]
    if several and last.endswith("s"):
        return last[:-1].upper()
    return PLACEHOLDERS.get(name, last.upper())


def choices_placeholder(choices: tuple[Any, ...]) -> str | None:
    """`MANY_CHOICES` if the choices are too wide to be a placeholder, else None."""
    return MANY_CHOICES if len(",".join(map(str, choices))) > WIDEST else None


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """The text with the flags instead of fields in backticks.

    Args:
        flags: name of a field to its flag, such as `--save-dtype`.
    """
    return re.sub(r"`([a-z_]+)`", lambda match: f"`{flags.get(match[1], match[1])}`", text)


def with_default(text: str, default: Any) -> str:
    """The text with the default, unless it has none, names it itself, or the default is a path of this machine."""
    if default is None or default in ("", ()) or "(default:" in text or (isinstance(default, Path) and default.is_absolute()):
        return text
    return f"{text} (default: {_shown(default)})"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, tuple):
        return " ".join(f"`{each}`" if " " in str(each) else str(each) for each in default)
    return str(default)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Layout of a help page: of equal flags only the short ones, wrapped descriptions, and indented lines as they are."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        flags = ", ".join([flag for flag in action.option_strings if "." not in flag] or action.option_strings)
        if action.nargs == 0:
            return flags
        return f"{flags} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _expand_help(self, action: argparse.Action) -> str:
        text, choices = super()._expand_help(action), [str(choice) for choice in action.choices or ()]
        if action.metavar != MANY_CHOICES or all(f"`{choice}`" in text for choice in choices):
            return text
        return f"{text}. One of {', '.join(choices)}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_fill(line, width, indent) for line in text.splitlines())


def _fill(line: str, width: int, indent: str) -> str:
    """The line, wrapped unless it is indented."""
    if line.startswith(" "):
        return indent + line
    return textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
