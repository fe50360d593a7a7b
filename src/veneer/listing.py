"""Tables of methods and hosts, and the support matrix. Methods, hosts and torch are imported only if they are needed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from veneer.discovery import Entry, find_entries
from veneer.static_source import first_line

MATRIX = Path(__file__).parent / "support_matrix.md"
"""Output of `python -m veneer.testing.matrix`; a test compares them."""
SURVEY = Path(__file__).parent / "survey.md"
PARITY = Path(__file__).parent / "parity.json"
"""Comparisons with other implementations; written by `python -m tests.parity.table`."""


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
    """The systems of the literature as Markdown: tables with hosts and what methods were compared with."""
    hosts, parity = method_hosts(), _largest_differences()
    return "\n".join(_with_columns(line, hosts, parity) for line in SURVEY.read_text("utf-8").strip().splitlines())


def method_hosts() -> dict[str, dict[str, str]]:
    """Method to host to the cell of the support matrix; `–` if the host has no site for the method."""
    header, _, *lines = (_cells(line) for line in support_matrix().splitlines())
    return {name.strip("`"): dict(zip((host.strip("`") for host in header[1:]), cells, strict=True)) for name, *cells in lines}


def format_difference(difference: float) -> str:
    """`1.8e-15`, or `0`."""
    return f"{difference:.1e}" if difference else "0"


def _largest_differences() -> dict[str, dict[str, float | None]]:
    """Method to kind of oracle to the largest difference, None without a number."""
    largest: dict[str, dict[str, float | None]] = {}
    for row in json.loads(PARITY.read_text("utf-8")):
        kinds, difference = largest.setdefault(row["method"], {}), row["difference"]
        before = kinds.get(row["kind"])
        kinds[row["kind"]] = difference if before is None else max(before, difference)
    return largest


def _with_columns(line: str, hosts: Mapping[str, Mapping[str, str]], parity: Mapping[str, Mapping[str, float | None]]) -> str:
    """A line of the survey's tables with two columns before the last one."""
    if not line.startswith("|"):
        return line
    *cells, paper = _cells(line)
    if paper in ("paper", "---"):
        columns = {"paper": ["hosts", "compared with"]}.get(paper, [paper, paper])
    else:
        here = re.match(r"(`[^`]+`(, )?)*", cells[-1])  # before the sentence
        names = re.findall(r"`(\w+)`", here[0] if here else "")
        columns = [_hosts(names, hosts), _oracles(names, parity)]
    return f"| {' | '.join((*cells, *columns, paper))} |"


def _hosts(names: Sequence[str], hosts: Mapping[str, Mapping[str, str]]) -> str:
    """The hosts that at least one of the methods adapts."""
    several, every = [hosts[name] for name in names if name in hosts], list(next(iter(hosts.values())))
    supported = [host for host in every if any(support[host] != "–" for support in several)]
    return "all" if len(supported) == len(every) else ", ".join(f"`{name}`" for name in supported)


def _oracles(names: Sequence[str], parity: Mapping[str, Mapping[str, float | None]]) -> str:
    """Kinds of oracles of the methods, each with its largest difference."""
    largest: dict[str, float | None] = {}
    for name in names:
        for kind, difference in parity.get(name, {}).items():
            before = largest.get(kind)
            largest[kind] = difference if before is None else max(before, difference or 0.0)
    return "; ".join(kind if number is None else f"{kind}, {format_difference(number)}" for kind, number in largest.items())


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _entries(kind: str) -> list[Entry]:
    return sorted(find_entries(f"veneer.{kind}", f"veneer.{kind}"), key=lambda entry: entry.name)
