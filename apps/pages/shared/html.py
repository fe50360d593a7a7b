"""Tables and notes in HTML: everything that is not written here is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST = 200
"""Rows of a table, and names of a list, at most."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls sideways by itself where the page is narrow. Numbers stand at the right."""
    kinds = [' class="number"' if isinstance(value, (int, float)) else "" for value in rows[0]] if rows else [""] * len(head)
    names = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST])
    more = f"<p>{len(rows) - MOST:,} more are not shown.</p>" if len(rows) > MOST else ""
    label = escape(caption)
    return (
        f'<div class="scrolls" role="region" tabindex="0" aria-label="{label}"><table class="plain"><caption>{label}</caption>'
        f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and what they are."""
    return f'<dl class="facts">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs)}</dl>'


def names(title: str, found: Sequence[str]) -> str:
    """A list that is folded up; nothing for an empty one."""
    if not found:
        return ""
    items = "".join(f"<li>{escape(name)}</li>" for name in found[:MOST])
    more = f"<p>{len(found) - MOST:,} more are not shown.</p>" if len(found) > MOST else ""
    return f"<details><summary>{escape(title)}: {len(found):,}</summary><ul>{items}</ul>{more}</details>"


def note(text: str, kind: str = "") -> str:
    """A paragraph that screen readers say when it comes; `kind`: `good` or `bad`."""
    mark = {"good": "✓ ", "bad": "✗ "}.get(kind, "")
    return f'<div class="note {kind}" role="status">{mark}{escape(text)}</div>' if text else ""


def _cell(value: object) -> str:
    number = isinstance(value, (int, float))
    text = f"{value:,}" if number else str(value)
    return f'<td class="number">{text}</td>' if number else f"<td>{escape(text)}</td>"
