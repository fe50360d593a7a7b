"""Tables of methods and hosts, and the support matrix. Methods, hosts and torch are imported only if they are needed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from veneer.discovery import Entry, find_entries
from veneer.static_source import first_line

MATRIX = Path(__file__).parent / "support_matrix.md"
"""Output of `python -m veneer.testing.matrix`; a test compares them."""
SURVEY = Path(__file__).parent / "survey.md"


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


def survey() -> str:
    """The systems of the literature as Markdown: tables with the hosts of methods from the support matrix."""
    hosts = method_hosts()
    return "\n".join(_with_hosts(line, hosts) for line in SURVEY.read_text("utf-8").strip().splitlines())


def method_hosts() -> dict[str, dict[str, str]]:
    """Method to host to the cell of the support matrix; `–` if the host has no site for the method."""
    header, _, *lines = (_cells(line) for line in support_matrix().splitlines())
    return {name.strip("`"): dict(zip((host.strip("`") for host in header[1:]), cells, strict=True)) for name, *cells in lines}


def _with_hosts(line: str, hosts: Mapping[str, Mapping[str, str]]) -> str:
    """A line of the survey's tables with a column before the last one."""
    if not line.startswith("|"):
        return line
    *cells, paper = _cells(line)
    if paper in ("paper", "---"):
        column = {"paper": "hosts"}.get(paper, paper)
    else:
        here = re.match(r"(`[^`]+`(, )?)*", cells[-1])  # before the sentence
        several = [hosts[name] for name in re.findall(r"`(\w+)`", here[0] if here else "") if name in hosts]
        names = [host for host in next(iter(hosts.values())) if any(support[host] != "–" for support in several)]
        column = "all" if len(names) == len(next(iter(hosts.values()))) else ", ".join(f"`{name}`" for name in names)
    return f"| {' | '.join((*cells, column, paper))} |"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _entries(kind: str) -> list[Entry]:
    return sorted(find_entries(f"veneer.{kind}", f"veneer.{kind}"), key=lambda entry: entry.name)
