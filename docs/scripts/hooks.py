"""Hooks of MkDocs: line breaks, empty tables of contents, and the file that only holds a navigation."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import Files, InclusionLevel
from mkdocs.structure.nav import Navigation

INLINE_CODE = re.compile(r"(?<!</span>)<code>([^<]*)</code>")
"""Code in a sentence or a cell; in a block, `<code>` follows an empty span."""
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w.-]*")
INTERVAL = re.compile(r"(?<=[\d%]) ± (?=\d)")


def on_nav(nav: Navigation, files: Files, **_: Any) -> Navigation:
    """Leaves out the page of `methods/SUMMARY.md`, which mkdocs-literate-nav has read by now."""
    for file in files:
        if file.src_uri == "methods/SUMMARY.md":
            file.inclusion = InclusionLevel.EXCLUDED
    return nav


def on_page_content(html: str, **_: Any) -> str:
    """Marks flags in inline code, as browsers break lines after a hyphen, permits line breaks after slashes, and keeps
    intervals such as 0.5 ± 0.1 on one line.
    """
    html = INTERVAL.sub("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", html)
    return INLINE_CODE.sub(lambda code: f"<code>{FLAG.sub(_marked, code[1].replace('/', '/<wbr>'))}</code>", html)


def _marked(flag: re.Match[str]) -> str:
    return f'<span class="flag">{flag[0]}</span>'


def on_page_context(context: dict[str, Any], page: Any, **_: Any) -> dict[str, Any]:
    """Hides an empty table of contents."""
    headings = list(page.toc)
    if len(headings) == 1 and not headings[0].children:
        page.meta["hide"] = sorted({*page.meta.get("hide", ()), "toc"})
    return context
