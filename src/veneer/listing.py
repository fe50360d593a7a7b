"""Tables of methods and hosts, and the support matrix. Methods, hosts and torch are imported only if they are needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from veneer.discovery import Entry, find_entries
from veneer.static_source import first_line

MATRIX = Path(__file__).parent / "support_matrix.md"
"""Output of `python -m veneer.testing.matrix`; a test compares them."""


def rows(kind: str) -> Iterator[tuple[str, str, str]]:
    """Name, distribution and first docstring line of each method or host.

    Args:
        kind: `methods` or `hosts`.
    """
    entries = _entries(kind)
    lines = {entry.name: first_line(entry) for entry in entries}
    if "veneer.injection.registry" in sys.modules or None in lines.values() or len(lines) < len(entries):
        import veneer

        yield from ((row["name"], row["source"], row["about"]) for row in getattr(veneer, kind).table())
    else:
        yield from ((entry.name, entry.source, lines[entry.name] or "") for entry in entries)


def support_matrix() -> str:
    """The support matrix as a Markdown table: from the package's file, or computed if the file misses a method or a host."""
    text = MATRIX.read_text("utf-8").strip()
    listed = re.findall(r"`(\w+)` \|", text.split("\n")[0]), re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    if listed == tuple([e.name for e in _entries(kind) if e.source == "veneer"] for kind in ("hosts", "methods")):
        return text
    from veneer.testing import matrix

    return matrix.support_matrix()


def _entries(kind: str) -> list[Entry]:
    return sorted(find_entries(f"veneer.{kind}", f"veneer.{kind}"), key=lambda entry: entry.name)
