"""Benchmark of several tasks: one hypernetwork, one shared adapter, and an adapter for each task, on three data sets.

The tasks are photos of clothes (a folder), scikit-learn's digits, and rendered shapes. All methods see the same number of images:
a run with all tasks has the steps of the runs with one task together. Runs that exist are not repeated.
`python -m veneer.pipelines.task_benchmark CLOTHES`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from veneer.base_models.pretraining.data.scenes import PLACES, SIZES, Compositor, Scene
from veneer.training.report.metrics import mean_interval

from .transfer import TransferConfig, transfer

SHARED = ("hyperformer_plus_plus", "hyperformer", "pfeiffer")
"""Methods that are trained on all tasks in one run."""
SINGLE = "pfeiffer"
"""Method that is trained on each task alone."""
STAR = ((50, 4), (61, 38), (97, 38), (68, 59), (79, 94), (50, 73), (21, 94), (32, 59), (3, 38), (39, 38))
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "triangle": ((50, 6), (94, 90), (6, 90)),
    "square": ((12, 12), (88, 12), (88, 88), (12, 88)),
    "diamond": ((50, 4), (88, 50), (50, 96), (12, 50)),
    "cross": ((36, 6), (64, 6), (64, 36), (94, 36), (94, 64), (64, 64), (64, 94), (36, 94), (36, 64), (6, 64), (6, 36), (36, 36)),
    "star": STAR,
    "arrow": ((6, 36), (54, 36), (54, 10), (94, 50), (54, 90), (54, 64), (6, 64)),
    "hexagon": ((27, 8), (73, 8), (96, 50), (73, 92), (27, 92), (4, 50)),
}
"""Class to the corners of its polygon, in percent of the side."""
BACKGROUNDS = ("white", "gray", "sky", "yellow", "green")


def render_shapes(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """Writes `count` images of each shape, filled or as an outline, at all sizes and places of the project's scenes."""
    styles = [_icon(corners, outline) for corners in SHAPES.values() for outline in (False, True)]
    compositor, rng = Compositor(np.stack(styles)), np.random.default_rng(seed)
    for row, name in enumerate(SHAPES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            size, place, background = (str(rng.choice(list(each))) for each in (SIZES, PLACES, BACKGROUNDS))
            pixels = compositor([Scene(2 * row + number % 2, size, place, background)])[0]
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def _icon(corners: Sequence[tuple[int, int]], outline: bool) -> np.ndarray[Any, Any]:
    """RGBA pixels of a polygon on a transparent background."""
    image = Image.new("RGBA", (128, 128))
    points = [(x * 1.28, y * 1.28) for x, y in corners]
    ImageDraw.Draw(image).polygon(points, None if outline else (200, 40, 60, 255), (60, 20, 120, 255), 8)
    return np.asarray(image)


def run_all(work: Path, tasks: Mapping[str, str], seeds: Sequence[int], **options: Any) -> bool:
    """Trains what is missing in the folder. Returns whether all runs are there: a run that is stopped ends the benchmark.

    Args:
        options: of `veneer transfer`, for all runs.
    """
    for seed in seeds:
        first, *others = [f"{name}={data}" for name, data in tasks.items()]
        every = {"data": first, "more_data": tuple(others), "tasks": True}
        runs: list[tuple[str, dict[str, Any]]] = [(f"{method}-{seed}", {"method": method, **every}) for method in SHARED]
        runs += [(f"{SINGLE}-{name}-{seed}", {"method": SINGLE, "data": data}) for name, data in tasks.items()]
        for name, own in runs:
            if not (work / name / "result.json").is_file():
                transfer(TransferConfig(**options, **own, seed=seed, out=work / name, resume=(work / name).exists()))
                if not (work / name / "result.json").is_file():
                    return False
    return True


def collect(work: Path, tasks: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each method: test accuracy of each task and their mean over seeds, and the trained parameters of all tasks."""
    rows = []
    for method in (*SHARED, "single"):
        accuracies, parameters = _scores(work, method, tasks, seeds)
        means = [sum(each) / len(each) for each in zip(*accuracies.values(), strict=True)]
        row = {name: str(mean_interval(values)) for name, values in accuracies.items()}
        label = f"{SINGLE}, one for each task" if method == "single" else f"{method}, one for all tasks"
        rows.append({"method": label, **row, "mean": str(mean_interval(means)), "parameters": parameters})
    return rows


def _scores(work: Path, method: str, tasks: Sequence[str], seeds: Sequence[int]) -> tuple[dict[str, list[float]], int]:
    """Test accuracies of each task by seed, and the number of trained parameters."""
    if method != "single":
        records = [_record(work / f"{method}-{seed}") for seed in seeds]
        scores = {name: [record["tasks"][name]["test_accuracy"] for record in records] for name in tasks}
        return scores, records[0]["trainable_parameters"]
    by_task = {name: [_record(work / f"{SINGLE}-{name}-{seed}") for seed in seeds] for name in tasks}
    scores = {name: [record["test_accuracy"] for record in records] for name, records in by_task.items()}
    return scores, sum(records[0]["trainable_parameters"] for records in by_task.values())


def _record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text("utf-8")))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = [*rows[0]]
    lines = [names, ["---"] * len(names), *[[f"{row[n]:,}" if n == "parameters" else row[n] for n in names] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m veneer.pipelines.task_benchmark", description=__doc__)
    parser.add_argument("clothes", help="folder of photos of clothes, as for veneer transfer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--model", default="bundled", help="as for veneer transfer (default: bundled)")
    parser.add_argument("--work", type=Path, default=Path("runs/tasks"), help="folder of the runs (default: runs/tasks)")
    parser.add_argument("--shapes", type=int, default=60, help="rendered images of each shape (default: 60)")
    parser.add_argument("--shots", type=int, help="training images per class (default: all)")
    given = parser.parse_args(arguments)
    shapes = given.work / "shapes"
    if not shapes.is_dir():
        render_shapes(shapes, given.shapes)
    tasks = {"clothes": given.clothes, "digits": "digits", "shapes": str(shapes)}
    options = {"epochs": given.epochs, "model": given.model, "shots": given.shots, "tracker": "none"}
    if run_all(given.work, tasks, given.seeds, **options):
        rows = collect(given.work, [*tasks], given.seeds)
        (given.work / "tasks.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(table(rows))


if __name__ == "__main__":
    main()
