"""What a run came to: its verdict in words, from `result.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from ...jobs import Job

OUTCOMES = {
    "learned": ("Learned", "good"), "partly": ("Partly learned", "fair"), "not_learned": ("Not learned", "bad"),
    "overfitted": ("Overfitted", "bad"), "unknown": ("Not judged", ""),
}  # fmt: skip
"""Outcome of a verdict to its words, and how it looks."""


def failed(result: Mapping[str, Any]) -> str:
    """In words, that a run which came to its end did not learn all that it should; nothing if it did, or nobody judged."""
    told = result.get("verdict")
    outcome = told.get("outcome") if isinstance(told, dict) else None
    return OUTCOMES[outcome][0].lower() if outcome in ("partly", "not_learned", "overfitted") else ""


def verdict(result: Mapping[str, Any]) -> str:
    """What a run came to, in HTML: the verdict first, then its reasons and what to change; nothing if there is none."""
    told = result.get("verdict")
    if not isinstance(told, dict):
        return ""
    words, kind = OUTCOMES.get(str(told.get("outcome")), OUTCOMES["unknown"])
    parts = [f"<h3>{words}</h3>", f"<p>{escape(str(told.get('summary') or ''))}</p>"]
    for name, title in (("reasons", "Why"), ("advice", "What to change")):
        lines = told.get(name)
        items = "".join(f"<li>{escape(_fields(str(line)))}</li>" for line in lines) if isinstance(lines, list) else ""
        parts.append(f"<h4>{title}</h4><ul>{items}</ul>" if items else "")
    return f'<section class="verdict {kind}" role="status">{"".join(parts)}</section>'


NAMES = {"generated-images": "images that the base generates"}
"""Flag to its field on a page, where that is called otherwise."""


def _fields(line: str) -> str:
    """A sentence with the names of fields in the place of the command's flags: `--eval-seeds 3` is `eval seeds = 3`."""

    def named(found: re.Match[str]) -> str:
        return NAMES.get(found[1], found[1].replace("-", " ")) + (" = " if found[2] else "")

    return re.sub(r"--([a-z][a-z-]*)( (?=[^\s-]))?", named, line)


def read_result(job: Job) -> dict[str, Any]:
    """What `result.json` says; nothing while there is none."""
    try:
        found = json.loads((job.run / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
