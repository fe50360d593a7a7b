"""The parity table: every method has a row, numbers come from oracles, and page and scripts agree with the record."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tests.parity.explicit import EXPLICIT
from tests.parity.page import EXPLICIT as REFERENCE
from tests.parity.page import PAGE, load_rows, render
from veneer.discovery import find_entries
from veneer.listing import format_difference

TESTS = Path(__file__).parent
ROWS = load_rows()
ORACLES = TESTS / "parity" / "oracles"
METHODS = {entry.name for entry in find_entries("veneer.methods", "veneer.methods") if entry.source == "veneer"}
MEASURED = [row for row in ROWS if row["kind"] != REFERENCE]


def read_scripts() -> dict[str, dict[str, Any]]:
    """Script to its `METHODS` and the arguments of its `ORACLE`, read from the source."""
    scripts = {}
    for path in ORACLES.rglob("[!_]*.py"):
        lines = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        values = {ast.unparse(node.targets[0]): node.value for node in lines}
        oracle: Any = values["ORACLE"]
        scripts[".".join(path.relative_to(ORACLES).with_suffix("").parts)] = {
            "methods": set(ast.literal_eval(values["METHODS"])),
            "oracle": [ast.literal_eval(argument) for argument in oracle.args],
            "class": oracle.func.id,
        }
    return scripts


SCRIPTS = read_scripts()


def test_every_method_has_a_row_and_the_others_a_reason() -> None:
    assert {row["method"] for row in ROWS} == METHODS
    assert {row["method"] for row in MEASURED} == METHODS - EXPLICIT.keys()


def test_the_page_is_the_record() -> None:
    """Every number of the page is one of the record, in its order."""
    assert PAGE.read_text("utf-8") == render(ROWS)
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 6 for row in cells)
    numbers = sorted((row[0].strip("`"), float(row[3])) for row in cells if row[3])
    assert numbers == sorted((row["method"], float(format_difference(row["difference"]))) for row in MEASURED)


def test_a_number_has_an_oracle_and_no_oracle_no_number() -> None:
    for row in ROWS:
        assert (row["difference"] is None) == (row["kind"] == REFERENCE), row
        assert bool(row["reason"]) == (row["difference"] is None), row
        assert (row["dtype"] in ("float64", "float32")) == (row["difference"] is not None), row
        if "/" in row["oracle"]:
            assert re.fullmatch("[0-9a-f]{40}", row["version"]), row
            assert row["kind"] in ("official code", row["oracle"]), row
        else:
            assert row["kind"] == REFERENCE or re.fullmatch(r"[\d.]+", row["version"]), row


def test_explicit_references_are_test_files() -> None:
    for name in EXPLICIT:
        assert (TESTS / "methods" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_and_its_rows(script: str) -> None:
    """The rows are of the methods and of the repository and commit that the script has."""
    rows = [row for row in ROWS if row["script"] == script]
    assert {row["method"] for row in rows} == SCRIPTS[script]["methods"]
    name, *version = SCRIPTS[script]["oracle"]
    assert {row["oracle"] for row in rows} == {name}
    if SCRIPTS[script]["class"] == "Repository":
        assert {row["version"] for row in rows} == {version[0]}


def test_every_row_has_a_script() -> None:
    assert {row["script"] for row in MEASURED} == SCRIPTS.keys()
