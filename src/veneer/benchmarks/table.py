"""A benchmark's outcomes as a Markdown table: a line a ratio, with the two values that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .contest import Outcome

HEAD = "| row | of / to | ratio | least to most | values |\n|---|---|---:|---:|---:|"


def lines(outcome: Outcome) -> list[str]:
    """The ratios of one contest; a contender that is in none has a line with its value alone."""
    values, unit = outcome.values(), outcome.unit
    found = [
        f"| {outcome.name} | {r.of} / {r.to} | {r.median:.3f} | {r.least:.3f} to {r.most:.3f} | "
        f"{values[r.of]:.4g} / {values[r.to]:.4g} {unit} |"
        for r in outcome.ratios()
    ]
    compared = {name for pair in outcome.pairs for name in pair}
    return found + [f"| {outcome.name} | {name} | | | {v:.4g} {unit} |" for name, v in values.items() if name not in compared]


def page(title: str, where: Mapping[str, Any], outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    """Title, table, what each row times, and where it ran."""
    table = [HEAD, *(line for outcome in outcomes for line in lines(outcome))]
    what = [f"- **{o.name}**: {o.what}." for o in outcomes]
    place = ", ".join(f"{key} {value}" for key, value in where.items())
    return "\n".join([f"# {title}", "", *table, "", *what, "", f"Ran on: {place}.", *(f"\n{note}." for note in notes), ""])
