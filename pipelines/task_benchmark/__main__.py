"""Command line of the benchmark of several tasks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer.atomic_files import write_atomically, write_json
from veneer.injection import VeneerError

from . import few_shot, joint, report, styles
from .icons import STYLES
from .report import Row
from .runs import Runs
from .task_images import Counts, TaskImages

TABLES: dict[str, tuple[str, Callable[[Runs, Sequence[int]], list[Row]], dict[str, str], str | None]] = {
    "all_images": (
        "All images of all tasks",
        joint.joint_rows,
        {joint.EACH: "over one for each", joint.ALL: "over one for all"},
        None,
    ),
    "few_images": (
        "Few images of one task, all images of the others",
        few_shot.few_shot_rows,
        {few_shot.BEST: "over best single", joint.ALL: "over one for all"},
        None,
    ),
    "styles": (
        "Filled icons with labels, outlines without",
        styles.style_rows,
        {joint.SINGLE: "outlines: over pfeiffer"},
        STYLES[1],
    ),
}
"""Key in `tasks.json` to title, function of the rows, columns of differences and the task that is compared."""


def benchmark(runs: Runs) -> str:
    """Trains what is missing, seed by seed, writes `tasks.json` and `tasks.md` after each, and returns the tables as Markdown.

    Raises:
        KeyboardInterrupt: a run was stopped; the same command continues.
    """
    text = ""
    for count in range(1, len(runs.seeds) + 1):
        text = write_results(runs, runs.seeds[:count])
    return text


def write_results(runs: Runs, seeds: Sequence[int]) -> str:
    """Trains what is missing for some seeds and writes the results; see `benchmark`."""
    result: dict[str, Any] = {"seeds": list(seeds), "settings": runs.settings}
    texts = []
    for key, (title, make, baselines, task) in TABLES.items():
        rows = make(runs, seeds)
        result[key] = report.as_json(rows, [*baselines])
        texts.append(f"**{title}**\n\n{report.table(rows, baselines, task)}\n")
    result["learning_rates"] = runs.chosen
    text = "\n".join(texts)
    write_json(runs.work / "tasks.json", result)
    write_atomically(runs.work / "tasks.md", text.encode())
    return text


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(prog="python -m veneer.pipelines.task_benchmark", description=__doc__)
    made.add_argument("clothes", help="photos of clothes, as for veneer transfer")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses learning rates")
    made.add_argument("--images", type=int, default=Counts.train, help="training images of each class (default: 40)")
    made.add_argument("--shots", type=int, default=Counts.shots, help="the same of a task with few (default: 4)")
    made.add_argument("--validation", type=int, default=Counts.validation, help="validation images of each class (default: 8)")
    made.add_argument("--test", type=int, default=Counts.test, help="most test images of each class (default: 20)")
    made.add_argument("--targets", nargs="+", help="tasks that have few images in turn (default: all)")
    made.add_argument("--epochs", type=int, default=4, help="passes over many images (default: 4)")
    made.add_argument("--few-epochs", type=int, default=10, help="passes over few images, 8 in a step (default: 10)")
    made.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates (default: three)")
    made.add_argument("--batch", type=int, default=16, help="images of a step (default: 16)")
    made.add_argument("--model", default="bundled", help="as for veneer transfer (default: bundled)")
    made.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: 32)")
    made.add_argument("--mixed-precision", default="no", help="no, bf16 or fp16 (default: no)")
    made.add_argument("--work", type=Path, default=Path("runs/tasks"), help="folder of the runs (default: runs/tasks)")
    return made


def open_runs(given: argparse.Namespace) -> Runs:
    """The runs of parsed flags."""
    counts = Counts(given.images, given.shots, given.validation, given.test)
    names = ("epochs", "batch", "model", "size", "mixed_precision")
    options = {name: getattr(given, name) for name in names}
    images = TaskImages(given.work, given.clothes, counts)
    return Runs(given.work, images, given.seeds, given.rates, options, given.few_epochs, given.targets)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        print(benchmark(open_runs(parser().parse_args(arguments))))
    except (VeneerError, OSError) as error:
        print(f"task_benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("task_benchmark: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
