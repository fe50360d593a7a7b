"""Detection of trigger tokens in a prompt, such as `<toy>`, whose adapter is not selected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.pipelines.generate import concepts_in_file

from veneer.injection import VeneerError

from ...context import escape_markup
from ...workspace import Workspace, printable

TOKEN = re.compile(r"<[^<>\s]{1,60}>")


@dataclass(frozen=True)
class MissingTokens:
    """Trigger tokens of a prompt that no selected adapter provides.

    Args:
        known: token to the user's newest adapter trained on it. `unknown`: tokens without an adapter.
    """

    known: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def adapters(self) -> list[str]:
        """Adapters to select, without duplicates."""
        return list(dict.fromkeys(self.known.values()))

    def describe(self) -> str:
        """Warnings in Markdown; empty without missing tokens."""
        warnings = [
            f"**{escape_markup(t)}** belongs to the adapter **{escape_markup(printable(n))}**, which is not selected."
            for t, n in self.known.items()
        ]
        warnings += [
            f"None of your adapters was trained on **{escape_markup(t)}**: the base model does not know this token."
            for t in self.unknown
        ]
        return "\n\n".join(f"⚠ {line}" for line in warnings)


def find_missing(workspace: Workspace, prompt: str, selected: Sequence[str], usable: Sequence[str]) -> MissingTokens:
    """Finds trigger tokens of a prompt that the selected adapters do not provide.

    Args:
        usable: names of the user's adapters to search, newest first.
    """
    tokens = list(dict.fromkeys(TOKEN.findall(prompt)))
    if not tokens:
        return MissingTokens()
    files = workspace.all_adapters()
    concepts = {name: _concepts(files[name]) for name in dict.fromkeys([*selected, *usable]) if name in files}
    provided = {token for name in selected for token in concepts.get(name, ())}
    absent = [token for token in tokens if token not in provided]
    known = {t: name for t in absent for name in reversed(usable) if t in concepts.get(name, ())}
    says_nothing = any(not concepts.get(name) for name in selected)  # a file from another program may provide any token
    return MissingTokens(known, () if says_nothing else tuple(t for t in absent if t not in known))


def _concepts(file: Any) -> tuple[str, ...]:
    try:
        return tuple(concepts_in_file(file))
    except (VeneerError, OSError):
        return ()
