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

Each method is compared with a reference implementation, its *oracle*: the code of the paper's authors at a commit, another
library, or, without either, an explicit reference, which is plain torch from the paper's equations in the method's test file.
The scripts read single classes and functions from a clone of the repository, set the trained parameters of both sides to the
same random values, far from the initial ones, and compare outputs and gradients for the same inputs.

A difference is max |a − b| / max |b| of a tensor: the largest over all outputs and over the gradients of all trained
tensors, for a random linear function of the outputs as loss. Selections are compared as 0/1 vectors; of decisions the number
is the share that differs. Differences up to about 1e-14 are rounding in float64, up to about 1e-6 rounding in float32 (column
"dtype"). A row without a number has an explicit reference only.
{counts}
"Known deviations" are those from the oracle's code; an empty cell means that none is known. Every deviation from a paper is in
the docstring of the method.

```sh
python -m tests.parity.table --sources FOLDER  # clones named OWNER+NAME, with or without a work tree
VENEER_PARITY_SOURCES=FOLDER pytest tests/parity
```

The first command writes this page and `src/veneer/parity.json`, from which `veneer methods --survey` has its column
"compared with". Without a clone of an oracle, its rows of the last run are kept. The second command runs the
comparisons as tests.
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
    counts = (
        f"Of {len(methods)} methods, {len(official)} are compared with their authors' code, {others} with another library or "
        "repository."
    )
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
