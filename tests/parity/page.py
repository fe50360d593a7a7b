"""Renders `docs/results/parity.md` from the recorded rows; imports neither torch nor a method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.discovery import find_entries
from veneer.listing import PARITY, format_difference

PAGE = Path(__file__).parents[2] / "docs" / "results" / "parity.md"
DRAWERS = ("selective", "additive", "prompt", "reparameterized", "hybrid")
EXPLICIT = "explicit reference"
HEADER = "| method | oracle | compared | largest difference | dtype | known deviations |\n|---|---|---|---:|---|---|"
INTRODUCTION = """# Parity with other implementations

Every method beside an *oracle*: the code of its authors at a commit, another library, or, without either, an explicit
reference, plain torch written from the paper's equations in the method's test file. The scripts read single classes and
functions from a clone of the repository, put trained parameters far from their initial values on both sides, and compare.

A difference is max |a − b| / max |b| of a tensor, the largest over all outputs and over the gradients of all trained
tensors for a random linear function of the outputs; for selections the same of their 0/1 vectors, for decisions the share
that differs. A row without a number was not run beside an oracle.
{counts}
Every deviation from a paper is in the docstring of the method; here are those from the oracle's code.

```sh
python -m tests.parity.table --sources FOLDER  # clones named OWNER+NAME, with or without a work tree
VENEER_PARITY_SOURCES=FOLDER pytest tests/parity
```

The first command writes this page and `src/veneer/parity.json`, from which `veneer methods --survey` has its column.
An oracle without a clone keeps the row of its last run.
"""


def drawer_of(module: str) -> str:
    """`veneer.methods.additive.bottleneck.mona` → `additive`."""
    return module.split(".")[2]


def load_rows() -> list[dict[str, Any]]:
    """The recorded rows."""
    rows: list[dict[str, Any]] = json.loads(PARITY.read_text("utf-8"))
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The page, one table for each drawer."""
    drawers = {entry.name: drawer_of(entry.module) for entry in find_entries("veneer.methods", "veneer.methods") if entry.module}
    methods = {row["method"] for row in rows}
    with_numbers = {row["method"] for row in rows if row["difference"] is not None}
    official = {row["method"] for row in rows if row["kind"] == "official code"}
    others = len(with_numbers - official)
    counts = f"Of {len(methods)} methods, {len(official)} are beside their authors' code, {others} beside other implementations."
    parts = [INTRODUCTION.format(counts=counts)]
    for drawer in DRAWERS:
        lines = [_line(row) for row in rows if drawers[row["method"]] == drawer]
        parts.append(f"## {drawer.capitalize()}\n\n" + "\n".join([HEADER, *lines]) + "\n")
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> str:
    number = "" if row["difference"] is None else format_difference(row["difference"])
    cells = (f"`{row['method']}`", _oracle(row), row["compared"], number, row["dtype"], row["deviations"])
    return f"| {' | '.join(cells)} |".replace("  |", " |")


def _oracle(row: dict[str, Any]) -> str:
    name, version = row["oracle"], row["version"]
    if "/" not in name:
        return f"{name} ({row['reason']})" if row["reason"] else f"{name} {version}"
    return f"[{name}](https://github.com/{name}/tree/{version}) @ {version[:12]}"
