"""Before and after of a training run: for each prompt, the image of the base model and the image with the adapter."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ...jobs import Job
from ..shared.images import inline_image
from ..shared.job_view import open_image
from ..shared.verdict import read_result

MOST = 8
"""Prompts shown."""


def comparison_html(job: Job) -> str:
    """Pairs of images in HTML, each from the same noise; empty for a run without them."""
    records = read_result(job).get("samples")
    pairs = [_pair(job.run, each) for each in records[:MOST]] if isinstance(records, list) else []
    content = "".join(pairs)
    return f'<section class="card"><h3>Before and after</h3><div class="pairs">{content}</div></section>' if content else ""


def _pair(run: Path, record: object) -> str:
    """One prompt; empty unless both images exist."""
    if not isinstance(record, dict):
        return ""
    name, prompt = Path(str(record.get("file"))).name, str(record.get("prompt") or "")
    before, after = open_image(run / "samples" / f"base-{name}"), open_image(run / "samples" / name)
    if before is None or after is None:
        return ""
    left = f"<div><span>base model</span>{inline_image(before, f'Base model: {prompt}')}</div>"
    right = f'<div><span class="after">with the adapter</span>{inline_image(after, f"With the adapter: {prompt}")}</div>'
    return f'<figure><div class="pair">{left}{right}</div><figcaption>{escape(prompt)}</figcaption></figure>'
