"""Method names from what `--method` gives. Imports no torch, so that help and completion can use it."""

from __future__ import annotations

SHORTHANDS = {"pivotal": "textual_inversion+lora"}
"""Usual names of several methods trained together."""


def split_methods(words: str) -> list[str]:
    """Method names from `lora`, `textual_inversion+lora`, or a shorthand such as `pivotal`.

    Raises:
        OptionError: empty or repeated names.
    """
    names = SHORTHANDS.get(words, words).split("+")
    if len(set(names)) != len(names) or not all(names):
        from veneer.injection.errors import OptionError

        message = f"method {words!r}: expected different names joined by '+', such as 'textual_inversion+lora'."
        raise OptionError(message, option="method", given=words)
    return names
