"""Trigger tokens in a prompt, such as `<toy>`, whose adapter is not selected: without it the base reads letters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.pipelines.generate import concept_of

from veneer.injection import VeneerError

from ...context import escaped
from ...workspace import Workspace, shown

TOKEN = re.compile(r"<[^<>\s]{1,60}>")


@dataclass(frozen=True)
class Missing:
    """Tokens of a prompt that no selected adapter brings.

    Args:
        known: token to the visitor's newest adapter that was trained on it. `unknown`: tokens that none was trained on.
    """

    known: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def adapters(self) -> list[str]:
        """To be selected, each once."""
        return list(dict.fromkeys(self.known.values()))

    def words(self) -> str:
        """What is wrong, in Markdown; nothing if nothing is."""
        found = [
            f"**{escaped(t)}** belongs to the adapter **{escaped(shown(n))}**, which is not selected."
            for t, n in self.known.items()
        ]
        found += [f"None of your adapters was trained on **{escaped(t)}**: the base reads it as letters." for t in self.unknown]
        return "\n\n".join(f"⚠ {line}" for line in found)


def missing(workspace: Workspace, prompt: str, selected: Sequence[str], usable: Sequence[str]) -> Missing:
    """What a prompt needs beside the selected adapters.

    Args:
        usable: names of the visitor's adapters to look among, the newest first.
    """
    tokens = list(dict.fromkeys(TOKEN.findall(prompt)))
    if not tokens:
        return Missing()
    files = workspace.all_adapters()
    concepts = {name: _concept(files[name]) for name in dict.fromkeys([*selected, *usable]) if name in files}
    here = {concepts.get(name) for name in selected}
    absent = [token for token in tokens if token not in here]
    known = {t: next(name for name in usable if concepts.get(name) == t) for t in absent if t in concepts.values()}
    says_nothing = None in here  # a file of another program may bring any token
    return Missing(known, () if says_nothing else tuple(t for t in absent if t not in known))


def _concept(file: Any) -> str | None:
    try:
        return concept_of(file)
    except (VeneerError, OSError):
        return None
