"""The catalogue of methods as HTML: each folded up to a line, with its options and its whole docstring inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from veneer.catalogue import Count, Described

from ._html import facts, table

NOTHING = (
    '<div class="empty"><p><strong>No method is like that.</strong> Take a filter away, or search for another word.</p></div>'
)
CONDITIONS = {"image": "a picture to follow", "embeds": "features of a picture", "text": "a text"}


def listed(found: Sequence[Described], counts: Mapping[str, Count | None] | None, model: str) -> str:
    """All methods, each to be opened; with what it trains on a model where that was counted."""
    if not found:
        return NOTHING
    each = "".join(_method(method, _counted(counts, method.name), model) for method in found)
    return f'<p role="status">{len(found)} method{"s" if len(found) > 1 else ""}. Open one to read all of it.</p>{each}'


def _counted(counts: Mapping[str, Count | None] | None, name: str) -> str:
    if counts is None:
        return ""
    count = counts.get(name)
    return "does not fit" if count is None else f"{short(count.trained)} trained"


def _method(method: Described, counted: str, model: str) -> str:
    small = f'<span class="counted">{escape(counted)}</span>' if counted else ""
    told = [
        ("In a formula", method.formula),
        ("Where it fits", method.needs),
        ("Kind", method.kind),
        ("Needs for each picture", ", ".join(CONDITIONS.get(c, c) for c in method.conditions) or "nothing"),
        ("Paper", method.paper),
        ("From", method.source),
        *([(f"On {model}", counted)] if counted else []),
    ]
    rows = [(o.name, o.type, o.default, o.about) for o in method.options]
    options = table(f"Options of {method.name}", ("Option", "Type", "Default", "What it does"), rows) if rows else ""
    line = f"<code>{escape(method.name)}</code> <span>{escape(method.about)}</span>{small}"
    inside = facts([(k, v) for k, v in told if v]) + options + f'<h3>In full</h3><pre tabindex="0">{escape(method.text)}</pre>'
    return f'<details class="method"><summary>{line}</summary>{inside}</details>'


def short(count: int) -> str:
    """A number for people: 12,345 or 1.23 million."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:,}"
