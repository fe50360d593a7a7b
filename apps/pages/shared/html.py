"""Tables, lists and notes in HTML; all inserted text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MAX_ROWS = 200
"""Maximum rows of a table and entries of a list."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls horizontally in a narrow window. Numbers are right-aligned."""
    kinds = [' class="number"' if isinstance(value, (int, float)) else "" for value in rows[0]] if rows else [""] * len(head)
    header = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MAX_ROWS])
    more = f"<p>{len(rows) - MAX_ROWS:,} more are not shown.</p>" if len(rows) > MAX_ROWS else ""
    label = escape(caption)
    return (
        f'<div class="scrolls" role="region" tabindex="0" aria-label="{label}"><table class="plain"><caption>{label}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """A definition list of names and values."""
    return f'<dl class="facts">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs)}</dl>'


def name_list(title: str, items_: Sequence[str]) -> str:
    """A collapsed list; empty for no entries."""
    if not items_:
        return ""
    items = "".join(f"<li>{escape(name)}</li>" for name in items_[:MAX_ROWS])
    more = f"<p>{len(items_) - MAX_ROWS:,} more are not shown.</p>" if len(items_) > MAX_ROWS else ""
    return f"<details><summary>{escape(title)}: {len(items_):,}</summary><ul>{items}</ul>{more}</details>"


def note(text: str, kind: str = "") -> str:
    """A note that screen readers announce; `kind`: `good` or `bad`."""
    mark = {"good": "✓ ", "bad": "✗ "}.get(kind, "")
    return f'<div class="note {kind}" role="status">{mark}{escape(text)}</div>' if text else ""


def step(number: int, title: str, hint: str = "") -> str:
    """Heading of one step of a form."""
    small = f"<small>{escape(hint)}</small>" if hint else ""
    return f'<h2 class="step"><span class="number">{number}</span>{escape(title)} {small}</h2>'


def section(title: str, about: str = "") -> str:
    """Heading of a part of a page, and a sentence about it."""
    return f'<h2 class="section">{escape(title)}</h2>' + (f'<p class="about">{escape(about)}</p>' if about else "")


def _cell(value: object) -> str:
    number = isinstance(value, (int, float))
    text = f"{value:,}" if number else str(value)
    return f'<td class="number">{text}</td>' if number else f"<td>{escape(text)}</td>"
