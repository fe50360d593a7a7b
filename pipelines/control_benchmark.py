"""How well control is learnt: methods × seeds on the bundled base, each `veneer control train` with nothing else said.

What is drawn under a held picture's map is compared with that map, against the same draws without it and with another's; the
interval in the table is over seeds. The base draws the pictures of a seed once, for all methods. Runs that are there already are
not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from veneer.training.report.metrics import Figure, figure

from .control import ControlConfig, control

METHODS = ("controlnet", "t2i_adapter", "controlnext", "ip_adapter")
KINDS = ("followed", "free", "misled")


def run_all(work: Path, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Make the runs that are missing."""
    for seed in seeds:
        for method in methods:
            out = work / f"{method}-{seed}"
            if (out / "result.json").is_file():
                continue
            drawn = next((path for other in methods if (path := work / f"{other}-{seed}" / "drawn").is_dir()), None)
            if drawn is not None and drawn.parent != out and not (out / "drawn").exists():
                shutil.copytree(drawn, out / "drawn")
            control(ControlConfig(method=method, seed=seed, out=out))


def collected(work: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a method, each figure with its interval over seeds."""
    rows = []
    for method in methods:
        found = [json.loads((work / f"{method}-{seed}" / "result.json").read_text()) for seed in seeds]
        figures = [record["figures"] for record in found]
        row: dict[str, Any] = {"method": method, "measure": figures[0]["measure"], "numbers": found[0]["parameters"]}
        row |= {kind: figure([f[kind] for f in figures]) for kind in KINDS}
        row |= {f"over_{kind}": figure([f["followed"] - f[kind] for f in figures]) for kind in KINDS[1:]}
        row["worst"] = min(f[f"over_{kind}"][0] - f[f"over_{kind}"][1] for f in figures for kind in KINDS[1:])
        row["seconds"] = figure([record["training"]["seconds"] for record in found])
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    heads = ["method", "numbers", "measure", "with it", "without", "with another's", "over without", "over another's"]
    heads += ["lowest bound of a run", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [row["method"], f"{row['numbers']:,}", row["measure"], *(f"{row[kind].mean:.3f}" for kind in KINDS)]
        cells += [_cell(row[f"over_{kind}"]) for kind in KINDS[1:]]
        cells += [f"{row['worst']:+.3f}", f"{row['seconds'].mean:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Figure) -> str:
    half = "" if value.high is None else f" ± {value.high - value.mean:.3f}"
    return f"{value.mean:+.3f}{half}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and write the table and a sheet a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/controls"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="where table and sheets go; none to only make the runs")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args(arguments)
    run_all(given.work, given.methods, given.seeds)
    if given.out:
        shown = table(collected(given.work, given.methods, given.seeds))
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "controls.md").write_text(shown + "\n")
        for method in given.methods:
            with Image.open(given.work / f"{method}-{given.seeds[0]}" / "sheet.png") as page:
                page.convert("RGB").save(given.out / f"control-{method}.jpg", quality=92, subsampling=0)
        print(shown)


if __name__ == "__main__":
    main()
