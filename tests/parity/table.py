"""`python -m tests.parity.table --sources FOLDER`: runs every oracle, and writes the recorded rows and their page."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from tests.parity import oracles
from tests.parity.explicit import EXPLICIT
from tests.parity.oracle import OracleMissing
from tests.parity.page import DRAWERS, PAGE, drawer_of, load_rows, render
from tests.parity.page import EXPLICIT as REFERENCE
from tests.parity.sources import SOURCES
from veneer.discovery import find_entries
from veneer.listing import PARITY


def scripts() -> Iterator[str]:
    """Dotted names of the oracles' modules."""
    for module in pkgutil.walk_packages(oracles.__path__, f"{oracles.__name__}."):
        if not module.ispkg:
            yield module.name


def run_script(name: str) -> list[dict[str, Any]]:
    """Measured rows of one oracle, as they are recorded.

    Raises:
        OracleMissing: there is no clone with the commit, or the package is not installed.
    """
    try:
        script = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OracleMissing(str(error.name), None) from error
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = script.rows()
    oracle, short = script.ORACLE, name.removeprefix(f"{oracles.__name__}.")
    about = {"oracle": oracle.name, "version": oracle.version, "script": short, "reason": ""}
    return [
        {**about, "kind": oracle.kind(row.method), **dataclasses.asdict(row), "difference": float(f"{row.difference:.1e}")}
        for row in rows
    ]


def explicit_rows() -> list[dict[str, Any]]:
    """Rows without a number."""
    about = {
        "oracle": REFERENCE,
        "version": "",
        "kind": REFERENCE,
        "script": "",
        "difference": None,
        "dtype": "",
        "deviations": "",
    }
    return [
        {**about, "method": name, "compared": f"`tests/methods/test_{name}.py`", "reason": reason}
        for name, reason in EXPLICIT.items()
    ]


def collect(only: str) -> list[dict[str, Any]]:
    """Rows of all oracles: measured now, or recorded where the name has no `only` in it or the oracle is missing."""
    record = load_rows() if PARITY.exists() else []
    rows = explicit_rows()
    for name in scripts():
        short = name.removeprefix(f"{oracles.__name__}.")
        before = [row for row in record if row["script"] == short]
        try:
            rows += before if only not in short else run_script(name)
        except OracleMissing as missing:
            print(f"skipped {short}: {missing}", file=sys.stderr)
            rows += before
    return sorted(rows, key=_order())


def _order() -> Any:
    drawers = {e.name: DRAWERS.index(drawer_of(e.module)) for e in find_entries("veneer.methods", "veneer.methods") if e.module}
    return lambda row: (drawers[row["method"]], row["method"], row["kind"] != "official code", row["oracle"], row["compared"])


def main() -> None:
    """Writes `src/veneer/parity.json` and `docs/results/parity.md`."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.table", description=__doc__)
    parser.add_argument(
        "--sources", default=os.environ.get(SOURCES, "."), help="folder of clones named OWNER+NAME (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="run the oracles with this text in their name, keep the rows of the others")
    options = parser.parse_args()
    os.environ[SOURCES] = options.sources
    rows = collect(options.only)
    PARITY.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(render(rows), "utf-8")
    print(f"wrote {PARITY} and {PAGE}: {len(rows)} rows")


if __name__ == "__main__":
    main()
