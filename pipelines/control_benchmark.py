"""Benchmark of control methods: methods × seeds on the bundled base model, each `veneer control train` with its defaults.

Images generated with the map of a held-out image are compared with that map, and with images from the same noise without a map
and with another image's map. The intervals in the table are over seeds. The training images of a seed are generated once for
all methods. Existing runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from veneer.training.report.metrics import mean_interval

from .control import ControlConfig, control

METHODS = ("controlnet", "t2i_adapter", "controlnext", "ip_adapter")
KINDS = ("followed", "free", "misled")


def run_all(work: Path, methods: Sequence[str], seeds: Sequence[int]) -> bool:
    """Runs what is missing in the folder. Returns whether all is there: a run that is stopped ends the benchmark."""
    for seed in seeds:
        for method in methods:
            out = work / f"{method}-{seed}"
            if (out / "result.json").is_file():
                continue
            images = next((path for other in methods if (path := work / f"{other}-{seed}" / "generated").is_dir()), None)
            if images is not None and images.parent != out and not (out / "generated").exists():
                shutil.copytree(images, out / "generated")
            control(ControlConfig(method=method, seed=seed, out=out))
            if not (out / "result.json").is_file():
                return False
    return True


def collect(work: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per method, with the metrics and their intervals over seeds."""
    rows = []
    for method in methods:
        found = [json.loads((work / f"{method}-{seed}" / "result.json").read_text()) for seed in seeds]
        metrics = [record["metrics"] for record in found]
        row: dict[str, Any] = {"method": method, "measure": metrics[0]["measure"], "parameters": found[0]["parameters"]}
        row |= {kind: mean_interval([f[kind] for f in metrics]) for kind in KINDS}
        row |= {f"over_{kind}": mean_interval([f["followed"] - f[kind] for f in metrics]) for kind in KINDS[1:]}
        row["worst"] = min(f[f"over_{kind}"][0] - f[f"over_{kind}"][1] for f in metrics for kind in KINDS[1:])
        row["seconds"] = mean_interval([record["training"]["seconds"] for record in found])
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ["method", "parameters", "metric", "with it", "without", "with another's", "over without", "over another's"]
    heads += ["lowest bound of a run", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [row["method"], f"{row['parameters']:,}", row["measure"], *(f"{row[kind].mean:.3f}" for kind in KINDS)]
        cells += [row[f"over_{kind}"].cell("+") for kind in KINDS[1:]]
        cells += [f"{row['worst']:+.3f}", f"{row['seconds'].mean:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, and writes the table and one image grid per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/controls"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder of the table and image grids (default: only run)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args(arguments)
    if run_all(given.work, given.methods, given.seeds) and given.out:
        shown = table(collect(given.work, given.methods, given.seeds))
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "controls.md").write_text(shown + "\n")
        for method in given.methods:
            with Image.open(given.work / f"{method}-{given.seeds[0]}" / "sheet.png") as page:
                page.convert("RGB").save(given.out / f"control-{method}.jpg", quality=92, subsampling=0)
        print(shown)


if __name__ == "__main__":
    main()
