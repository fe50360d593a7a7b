"""Verdict of a run from `result.json`, as text and HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from ...jobs import Job

OUTCOMES = {
    "learned": ("Learned", "good"), "partly": ("Partly learned", "fair"), "not_learned": ("Not learned", "bad"),
    "overfitted": ("Overfitted", "bad"), "unknown": ("No verdict", ""),
}  # fmt: skip
"""Outcome of a verdict to its label and CSS class."""


def shortfall(result: Mapping[str, Any]) -> str:
    """Label of an unsuccessful verdict; empty if the run succeeded or has no verdict."""
    judgment = result.get("verdict")
    outcome = judgment.get("outcome") if isinstance(judgment, dict) else None
    return OUTCOMES[outcome][0].lower() if outcome in ("partly", "not_learned", "overfitted") else ""


def verdict_html(result: Mapping[str, Any]) -> str:
    """Verdict in HTML: outcome, reasons and advice; empty without a verdict."""
    judgment = result.get("verdict")
    if not isinstance(judgment, dict):
        return ""
    words, kind = OUTCOMES.get(str(judgment.get("outcome")), OUTCOMES["unknown"])
    parts = [f"<h3>{words}</h3>", f"<p>{escape(str(judgment.get('summary') or ''))}</p>"]
    for name, title in (("reasons", "Why"), ("advice", "What to change")):
        lines = judgment.get(name)
        items = "".join(f"<li>{escape(replace_flags(str(line)))}</li>" for line in lines) if isinstance(lines, list) else ""
        parts.append(f"<h4>{title}</h4><ul>{items}</ul>" if items else "")
    return f'<section class="verdict {kind}" role="status">{"".join(parts)}</section>'


FIELD_NAMES = {"generated-images": "generated training images", "lp-ft": "LP-FT", "shots": "images per class"}
"""Flag to the label of its field on a page, if different."""


def replace_flags(line: str) -> str:
    """Replaces flags in a sentence by labels of form fields: `--eval-seeds 3` becomes `eval seeds = 3`."""

    def field_name(match: re.Match[str]) -> str:
        return FIELD_NAMES.get(match[1], match[1].replace("-", " ")) + (" = " if match[2] else "")

    return re.sub(r"--([a-z][a-z-]*)( (?=[^\s-]))?", field_name, line)


def read_result(job: Job) -> dict[str, Any]:
    """Content of `result.json`; empty if missing or invalid."""
    try:
        content = json.loads((job.run / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
