"""Means and 95 % intervals over seeds, and the Markdown page, of the few-photo benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.training.report.metrics import MeanInterval, mean_interval

from .scores import kept

KEPT = ("prompt", "ground", "place")
"""Scores of placed prompts that are reported relative to the base."""

ALL = "all"
"""Name of the row over all subjects."""

Row = dict[str, Any]


def summarize(runs: Sequence[Row]) -> list[Row]:
    """One row per preset and subject, and one per preset over all subjects: each score's mean and 95 % t-interval over seeds.

    Args:
        runs: of every subject, preset and seed: `subject`, `preset`, `seed`, and scores by name, None where unknown. In the row
            over all subjects, a seed's score is the mean over subjects, and a share kept is the ratio of these means.
    """
    rows = list[Row]()
    for preset in dict.fromkeys(run["preset"] for run in runs):
        of_preset = [run for run in runs if run["preset"] == preset]
        for subject in dict.fromkeys(run["subject"] for run in of_preset):
            rows.append(_row(preset, subject, [run for run in of_preset if run["subject"] == subject]))
        seeds = dict.fromkeys(run["seed"] for run in of_preset)
        means = [_mean([run for run in of_preset if run["seed"] == seed]) for seed in seeds]
        rows.append(_row(preset, ALL, means))
    return rows


def _mean(runs: Sequence[Row]) -> Row:
    """Mean over subjects of each score that all of them have."""
    names = [name for name, value in runs[0].items() if isinstance(value, (int, float)) and name != "seed"]
    columns = {name: [run[name] for run in runs] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items() if None not in column}


def _row(preset: str, subject: str, seeds: Sequence[Row]) -> Row:
    shares = [{f"{name}.kept": kept(run.get(f"{name}.trained"), run.get(f"{name}.base")) for name in KEPT} for run in seeds]
    row: Row = {"preset": preset, "subject": subject, "seeds": len(seeds)}
    for name in {**seeds[0], **shares[0]}:
        values = [value for run, share in zip(seeds, shares, strict=True) if (value := {**run, **share}.get(name)) is not None]
        if name not in ("preset", "subject", "seed") and values:
            row[name] = mean_interval(values)
    return row


def page(rows: Sequence[Row], judges: Mapping[str, str], facts: Sequence[str]) -> str:
    """The Markdown page: facts on the run, a claim for each preset, and two tables.

    Args:
        rows: of `summarize`. `judges`: key to the name of the model. `facts`: sentences on what was run.
    """
    claims = [claim(preset, rows, judges) for preset in dict.fromkeys(row["preset"] for row in rows)]
    names = "; ".join(f"{key}: {name}" for key, name in judges.items())
    lines = ["# Personalization from few photos", "", *facts, "", f"Judges: {names}. ± is half a 95 % interval over seeds.", ""]
    return "\n".join([*lines, *claims, "", similarity_table(rows, list(judges)), "", prompt_table(rows, list(judges)), ""])


def claim(preset: str, rows: Sequence[Row], judges: Mapping[str, str]) -> str:
    """Summary of a preset: for how many subjects the gain's interval is above 0 for all judges, and the means."""
    subjects = [row for row in rows if row["preset"] == preset and row["subject"] != ALL]
    total = next(row for row in rows if row["preset"] == preset and row["subject"] == ALL)
    rose = sum(all((row[f"{key}.gain"].low or 0.0) > 0 for key in judges) for row in subjects)
    both = "by both judges" if len(judges) == 2 else f"by {', '.join(judges)}"
    identified = ", ".join(f"{key} {total[f'{key}.identified'].mean:.0%}" for key in judges)
    shares = ", ".join(f"{name} {total[f'{name}.kept'].mean:.0%}" for name in KEPT if f"{name}.kept" in total)
    known = f"similarity clearly above the base {both} in {rose} of {len(subjects)} subjects"
    if total["seeds"] < 2:
        known = "one seed, so no intervals"
    return f"- **{preset}**: {known}; identified: {identified}; relative to the base: {shares or 'unknown'}."


def similarity_table(rows: Sequence[Row], judges: Sequence[str]) -> str:
    """Table of similarity to the photos and identification by each judge."""
    heads = ["preset", "subject"]
    for key in judges:
        heads += [
            f"{word} ({key})"
            for word in ("base", "trained", "gain", "photos", "identified", "base identified", "photos identified")
        ]
    lines = list[list[str]]()
    for row in rows:
        cells = [row["preset"], row["subject"]]
        for key in judges:
            cells += [cell(row.get(f"{key}.{name}")) for name in ("base", "trained", "gain", "ceiling")]
            cells += [
                cell(row.get(f"{key}.{name}"), percent=True) for name in ("identified", "base_identified", "photos_identified")
            ]
        lines.append(cells)
    return markdown(heads, lines)


def prompt_table(rows: Sequence[Row], judges: Sequence[str]) -> str:
    """Table of prompt similarity, background and place, also relative to the base, drift, time and size."""
    heads = ["preset", "subject"]
    for name in KEPT:
        heads += [f"{name}: base", "trained", "kept"]
    heads += [*(f"drift ({key})" for key in judges), "steps", "seconds", "parameters", "bytes of the file"]
    lines = list[list[str]]()
    for row in rows:
        cells = [row["preset"], row["subject"]]
        for name in KEPT:
            percent = name != "prompt"
            cells += [cell(row.get(f"{name}.{side}"), percent=percent) for side in ("base", "trained")]
            cells.append(cell(row.get(f"{name}.kept"), percent=True))
        cells += [cell(row.get(f"{key}.drift")) for key in judges]
        cells += [f"{row[name].mean:,.0f}" for name in ("steps", "seconds", "parameters", "stored_bytes")]
        lines.append(cells)
    return markdown(heads, lines)


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def cell(value: MeanInterval | None, percent: bool = False) -> str:
    """Mean and half interval; `-` for an unknown score."""
    if value is None:
        return "-"
    half = 0.0 if value.high is None else value.high - value.mean
    if percent:
        return f"{value.mean:.0%}" + (f" ± {100 * half:.0f}" if half >= 0.005 else "")
    return f"{value.mean:.3f}" + (f" ± {half:.3f}" if half >= 0.0005 else "")
