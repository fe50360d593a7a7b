"""The benchmark of several tasks: rendered shapes, and the table of runs that are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from veneer.pipelines.task_benchmark import SHAPES, SHARED, SINGLE, collect, render_shapes, run_all, table

from veneer.classification.data.sources import open_source


def test_shapes_are_rendered_in_both_styles(tmp_path: Path) -> None:
    source = open_source(render_shapes(tmp_path, 2))
    assert set(source.classes) == set(SHAPES)
    assert len(source) == 2 * len(SHAPES)
    fills = {}
    for number in (0, 1):
        with Image.open(tmp_path / "square" / f"{number:03d}.png") as image:
            fills[number] = (np.asarray(image) == (200, 40, 60)).all(-1).sum()
    assert fills[0] > 500
    assert fills[1] == 0, "an outline has no filling"


def test_the_table_has_the_scores_of_each_task(tmp_path: Path) -> None:
    """Two seeds of recorded runs: none is trained again."""
    for seed in (0, 1):
        for place, method in enumerate(SHARED):
            tasks = {"a": {"test_accuracy": 0.1 * (place + seed)}, "b": {"test_accuracy": 0.5}}
            _write(tmp_path / f"{method}-{seed}", {"tasks": tasks, "trainable_parameters": 1000 * (place + 1)})
        for task, accuracy in (("a", 0.2), ("b", 0.4)):
            _write(tmp_path / f"{SINGLE}-{task}-{seed}", {"test_accuracy": accuracy, "trainable_parameters": 30})
    assert run_all(tmp_path, {"a": "missing", "b": "missing"}, (0, 1), model="missing")
    rows = collect(tmp_path, ("a", "b"), (0, 1))
    assert [row["parameters"] for row in rows] == [1000, 2000, 3000, 60]
    assert [row["a"][:5] for row in rows] == ["0.050", "0.150", "0.250", "0.200"]
    assert [row["mean"][:5] for row in rows] == ["0.275", "0.325", "0.375", "0.300"]
    assert table(rows).splitlines()[2].startswith("| hyperformer_plus_plus, one for all tasks | 0.050")


def _write(folder: Path, record: object) -> None:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(record))
