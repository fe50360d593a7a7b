"""Markdown table of benchmark results: one line per ratio, with its two values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .interleaved_timing import ContestResult

HEAD = "| benchmark | compared | median ratio | min to max | values |\n|---|---|---:|---:|---:|"


def lines(outcome: ContestResult) -> list[str]:
    """Lines of one contest: its ratios, and the values of contenders without a ratio."""
    values, unit = outcome.values(), outcome.unit
    ratios = [
        f"| {outcome.name} | {r.of} / {r.to} | {r.median:.3f} | {r.least:.3f} to {r.most:.3f} | "
        f"{values[r.of]:.4g} / {values[r.to]:.4g} {unit} |"
        for r in outcome.ratios()
    ]
    compared = {name for pair in outcome.pairs for name in pair}
    return ratios + [f"| {outcome.name} | {name} | | | {v:.4g} {unit} |" for name, v in values.items() if name not in compared]


def page(title: str, where: Mapping[str, Any], outcomes: Sequence[ContestResult], notes: Sequence[str]) -> str:
    """Page with the title, the table, descriptions of the rows, and the environment."""
    table = [HEAD, *(line for outcome in outcomes for line in lines(outcome))]
    what = [f"- **{o.name}**: {o.what}." for o in outcomes]
    place = ", ".join(f"{key} {value}" for key, value in where.items())
    return "\n".join([f"# {title}", "", *table, "", *what, "", f"Environment: {place}.", *(f"\n{note}." for note in notes), ""])
