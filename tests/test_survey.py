"""The list of the survey's systems names methods and commands that exist, and misses no method."""

from __future__ import annotations

import json
import re

import pytest

from veneer.commands import COMMANDS
from veneer.discovery import find_entries
from veneer.listing import PARITY, SURVEY, format_difference, survey

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SURVEY.read_text("utf-8").splitlines()
    if line.startswith("| ")
]
SYSTEMS = {row[0]: row for row in ROWS if row[0] != "system"}
DOMAINS = {"language", "vision", "vision-language", "generative"}
METHODS = {entry.name for entry in find_entries("veneer.methods", "veneer.methods") if entry.source == "veneer"}


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", cell))


def test_every_method_is_in_the_list() -> None:
    assert set().union(*(names_in(row[2]) for row in SYSTEMS.values())) >= METHODS


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_system(system: str) -> None:
    """Its names exist; without names there is a reason; the domain is one of four."""
    _, domain, here, paper = SYSTEMS[system]
    assert domain in DOMAINS
    assert paper
    assert names_in(here) - {"where"} <= METHODS
    assert {command.split()[1] for command in re.findall(r"`(veneer [a-z ]+)`", here)} <= set(COMMANDS)
    assert names_in(here) or here.endswith(".") or "`veneer " in here


def test_every_drawer_has_systems() -> None:
    drawers = re.split(r"^## ", SURVEY.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert [drawer.split()[0] for drawer in drawers] == ["Selective", "Additive", "Prompt", "Reparameterized", "Hybrid"]
    assert all(drawer.count("\n| ") > 5 for drawer in drawers)


def test_hosts_of_a_method() -> None:
    """BitFit works on all hosts, CoCoOp on one, a command is no method, and a system that is not here has none."""
    hosts = {
        cells[0]: cells[3]
        for line in survey().splitlines()
        if (cells := [c.strip() for c in line.strip("|").split("|")])[0] in SYSTEMS
    }
    assert hosts["BitFit"] == "all"
    assert hosts["CoCoOp"] == "`clip_classifier`"
    assert hosts["SAN"] == hosts["AdapterSoup"] == ""


def test_comparisons_of_a_method() -> None:
    """The largest recorded difference of each kind of oracle; nothing for a command."""
    column = {
        cells[0]: cells[4]
        for line in survey().splitlines()
        if (cells := [c.strip() for c in line.strip("|").split("|")])[0] in SYSTEMS
    }
    recorded = json.loads(PARITY.read_text("utf-8"))

    def largest(kind: str, *methods: str) -> str:
        return format_difference(max(row["difference"] for row in recorded if row["method"] in methods and row["kind"] == kind))

    assert column["Compacter"] == f"official code, {largest('official code', 'compacter')}"
    both = ("hyperformer", "hyperformer_plus_plus")
    assert column["HyperFormer, HyperFormer++"] == f"official code, {largest('official code', *both)}"
    assert column["(IA)³"] == f"lycoris, {largest('lycoris', 'ia3')}; peft, {largest('peft', 'ia3')}"
    assert column["E²VPT"] == f"official code, {largest('official code', 'e2vpt')}"  # of several rows
    assert column["BitFit"] == "explicit reference"
    assert column["AdapterSoup"] == column["SAN"] == ""
    for name, row in SYSTEMS.items():
        assert bool(column[name]) == bool(re.match(r"`(\w+|veneer [a-z ]+`, `\w+)`", row[2])), name
