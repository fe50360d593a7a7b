"""Method names of `--method`. Imports no torch, for fast help and completion."""

from __future__ import annotations

SHORTHANDS = {"pivotal": "textual_inversion+lora"}
"""Short names of methods that are trained together."""


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
