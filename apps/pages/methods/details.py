"""Catalog of methods as HTML: collapsible entries with properties, options and docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from veneer.injection import VeneerError, methods
from veneer.method_catalog import MethodEntry, ParameterCount
from veneer.method_search import USES, Use

from ..shared.html import facts, table
from .availability import pages_of, reason_not_offered

NO_MATCH = '<div class="empty"><p><strong>No method matches.</strong> Remove a filter, or search for another word.</p></div>'
CONDITIONS = {"image": "a control image", "embeds": "embeddings of a reference image", "text": "a text"}
KINDS = {
    "selective": "Selective: trains some of the model's own parameters",
    "additive": "Additive: adds small new layers",
    "prompt": "Prompt: trains token embeddings or pixels of the input",
    "reparameterized": "Reparameterized: trains a small weight update",
    "hybrid": "Hybrid: several of these",
}
"""Kind of a method to its heading, in the order of the page."""
MANY = 12
"""Methods of a use from which on they are grouped by kind."""
OPEN_METHOD = (
    "const method = document.getElementById('method-{}'); method.open = true; method.scrollIntoView(); "
    "method.firstElementChild.focus()"
)
"""Script of a link to a method; a URL fragment would switch Gradio to its first tab."""
Groups = Sequence[tuple[Use | None, Sequence[MethodEntry]]]


def method_list(groups: Groups, counts: Mapping[str, ParameterCount | None] | None, model: str, start: bool = False) -> str:
    """Collapsible list of methods, optionally grouped under headings and with parameter counts for a model.

    Args:
        start: prepend recommended methods by use.
    """
    count = sum(len(entries) for _, entries in groups)
    if not count:
        return NO_MATCH
    parts = [f'<p role="status">{count} method{"s" if count > 1 else ""}. Open one for details.</p>']
    parts += [_start([method for _, entries in groups for method in entries])] if start else []
    for use, entries in groups:
        parts += [f'<h2 class="use">{escape(use.title)}</h2><p class="about">{escape(use.about)}</p>'] if use else []
        for heading, members in _by_kind(entries, use):
            parts += [f'<h3 class="kind">{escape(heading)}</h3>'] if heading else []
            parts += [_method(method, _counted(counts, method.name), model, use) for method in members]
    return "".join(parts)


def _by_kind(entries: Sequence[MethodEntry], use: Use | None) -> list[tuple[str, list[MethodEntry]]]:
    """The methods of a use: recommended ones first, without a heading, then by kind if there are many."""
    first = [method for method in entries if use is None or len(entries) < MANY or use.key in method.recommended_for]
    others = [method for method in entries if method not in first]
    kinds = sorted({method.kind for method in others}, key=lambda kind: [*KINDS, kind].index(kind))
    return [("", first), *((KINDS.get(kind, f"From {kind}"), [m for m in others if m.kind == kind]) for kind in kinds)]


def _start(entries: Sequence[MethodEntry]) -> str:
    """Recommended methods by use, as buttons that open their entries."""
    rows = []
    for use in USES:
        links = ", ".join(
            f'<button type="button" class="link" onclick="{OPEN_METHOD.format(method.name)}"><code>{method.name}</code></button>'
            for method in entries
            if use.key in method.recommended_for
        )
        rows += [f"<dt>{escape(use.title)}</dt><dd>{links}</dd>"] if links else []
    return f'<section class="start" aria-label="Start here"><h2>Start here</h2><dl class="facts">{"".join(rows)}</dl></section>'


def _counted(counts: Mapping[str, ParameterCount | None] | None, name: str) -> str:
    if counts is None:
        return ""
    count = counts.get(name)
    return "not supported" if count is None else f"{short_count(count.trainable)} trainable"


def _method(method: MethodEntry, counted: str, model: str, group: Use | None) -> str:
    """One entry. `group`: the use under whose heading it is."""
    small = f'<span class="counted">{escape(counted)}</span>' if counted else ""
    mark = '<span class="mark">start here</span>' if group is not None and group.key in method.recommended_for else ""
    pairs = [
        ("Formula", method.formula),
        ("Used for", ", ".join(use.title for use in USES if use.key in method.uses)),
        *_where(method.name),
        ("Attaches to", method.needs),
        ("Kind", method.kind),
        ("Conditioning", ", ".join(CONDITIONS.get(c, c) for c in method.conditions) or "nothing"),
        ("Paper", method.paper),
        ("From", method.source),
        *([(f"On {model}", counted)] if counted else []),
    ]
    rows = [(o.name, o.type, o.default, o.about) for o in method.options]
    options = table(f"Options of {method.name}", ("Option", "Type", "Default", "What it does"), rows) if rows else ""
    line = f"<code>{escape(method.name)}</code> <span>{escape(method.about)}</span>{mark}{small}"
    inside = (
        facts([(k, v) for k, v in pairs if v]) + options + f'<h3>Documentation</h3><pre tabindex="0">{escape(method.text)}</pre>'
    )
    return f'<details class="method" id="method-{escape(method.name)}"><summary>{line}</summary>{inside}</details>'


def _where(name: str) -> list[tuple[str, str]]:
    """The pages that train a method, or why none does."""
    try:
        reason, pages = reason_not_offered(methods.get(name)), pages_of(name)
    except (ImportError, VeneerError, AttributeError):  # its entry has the error
        return []
    if reason:
        return [("Only as a command", f"{reason[0].upper()}{reason[1:]}")]
    return [("Trained on the page", "; ".join(pages))] if pages else []


def short_count(count: int) -> str:
    """Formats a count: 12,345 or 1.23 million."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:,}"
