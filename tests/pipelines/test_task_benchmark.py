"""The benchmark of combinations of adapters: images, the choice of the learning rate, and tables of a small model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from veneer.pipelines.task_benchmark import few_shot, joint, styles
from veneer.pipelines.task_benchmark.__main__ import TABLES, write_results
from veneer.pipelines.task_benchmark.icons import SHAPES, STYLES, render_icons
from veneer.pipelines.task_benchmark.report import Row, as_json, table
from veneer.pipelines.task_benchmark.runs import Runs
from veneer.pipelines.task_benchmark.task_images import Counts, TaskImages

from tests.classification.small import CLASSES, image_folder, model_folder
from tests.raising import raises
from veneer.base_models.pretraining.data.scenes import PLACES
from veneer.classification.predict import open_predictor
from veneer.formats._core.stored_adapters import read_stored
from veneer.injection import OptionError

TARGET = "outlines"


def test_icons_are_rendered_in_both_styles(tmp_path: Path) -> None:
    """An outline leaves the background in the middle of its icon; the label is the shape or the place."""
    counts = dict[str, int]()
    for style in STYLES:
        folder = render_icons(tmp_path / style, style, 6)
        assert {path.name for path in folder.iterdir()} == set(SHAPES)
        counts[style] = sum(_foreground(path).sum() for path in sorted((folder / "square").iterdir()))
    assert 0 < counts["outlines"] < counts["filled"] / 2
    places = render_icons(tmp_path / "places", "filled", 2, "place")
    assert {path.name for path in places.iterdir()} == set(PLACES)
    for name in ("top left", "bottom right"):
        for path in sorted((places / name).iterdir()):
            rows, columns = np.nonzero(_foreground(path))
            corner = -1 if name == "top left" else 1
            assert {np.sign(rows.mean() - 63.5), np.sign(columns.mean() - 63.5)} == {corner}


def _foreground(path: Path) -> Any:
    """Pixels that differ from the corner at the margin, which is background."""
    with Image.open(path) as image:
        pixels = np.asarray(image).astype(int)
    return np.abs(pixels - pixels[0, 0]).sum(-1) > 30


def test_few_images_are_some_of_many(tmp_path: Path) -> None:
    images = TaskImages(tmp_path / "work", str(image_folder(tmp_path / "colors", 20)), Counts(5, 2, 1, 2))
    files = {
        (kind, seed): {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
        for kind in ("many", "few")
        for seed in (0, 1)
        for folder in [getattr(images, kind)("clothes", seed)]
    }
    training = {key: {name for name in names if name.startswith("train")} for key, names in files.items()}
    assert {key: len(names) for key, names in training.items()} == {
        (kind, seed): count * len(CLASSES) for kind, count in (("many", 5), ("few", 2)) for seed in (0, 1)
    }
    for seed in (0, 1):
        assert training["few", seed] < training["many", seed]
    assert training["many", 0] != training["many", 1]
    assert len({frozenset(names - training[key]) for key, names in files.items()}) == 1, "the same held-out images"


def test_differences_are_paired_by_seed() -> None:
    base, other = Row("base", {"a": [0.2, 0.6], "b": [0.4, 0.8]}, 5), Row("other", {"a": [0.3, 0.7], "b": [0.5, 0.9]}, 1234)
    assert other.means == pytest.approx([0.4, 0.8])
    gain = other.over(base)
    assert (gain.mean, gain.half) == pytest.approx((0.1, 0.0), abs=1e-9)
    assert other.over(base, "b").mean == pytest.approx(0.1)
    record = as_json([base, other], ["base"])
    assert "base" not in record[0]["over"]
    assert record[1]["over"]["base"]["mean"] == pytest.approx(0.1)
    assert table([base, other], {"base": "over base"}).splitlines()[-1].endswith("| +10.0 ± 0.0 | 1,234 |")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of a small model with one seed, one learning rate and one task with few images."""
    folder = tmp_path_factory.mktemp("tasks")
    made = open_runs(folder)
    write_results(made, (0,))
    return made


def open_runs(folder: Path, rates: tuple[float, ...] = (1e-2,), **options: Any) -> Runs:
    colors, model = folder / "colors", folder / "vit"
    if not colors.exists():
        image_folder(colors, 20)
        model_folder(folder, "vit")
    images = TaskImages(folder / "work", str(colors), Counts(3, 2, 1, 2))
    options = {"epochs": 1, "batch": 16, "model": str(model), **options}
    return Runs(folder / "work", images, (0, 1), rates, options, 1, (TARGET,))


def test_all_tables_are_written(runs: Runs) -> None:
    record = json.loads((runs.work / "tasks.json").read_text())
    assert set(TABLES) < set(record)
    for key, tasks in (("all_images", ["clothes", "digits", *STYLES]), ("few_images", [TARGET]), ("styles", [*STYLES])):
        assert all([*row["test_accuracy"]] == tasks for row in record[key])
    assert [row["row"] for row in record["all_images"]][:2] == [joint.EACH, joint.ALL]
    rows = {row["row"]: row for row in record["few_images"]}
    best, alone, other = (rows[name] for name in (few_shot.BEST, "pfeiffer, few images alone", few_shot.TRANSFERRED))
    assert best["test_accuracy"] in (alone["test_accuracy"], other["test_accuracy"])
    assert (runs.work / "tasks.md").read_text().count("\n| --- |") == len(TABLES)


def test_finished_runs_are_not_repeated(runs: Runs) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted((runs.work / "runs").rglob("result.json"))}
    text = (runs.work / "tasks.md").read_text()
    again = open_runs(runs.work.parent)
    assert write_results(again, (0,)) == text
    assert {path: path.stat().st_mtime_ns for path in sorted((runs.work / "runs").rglob("result.json"))} == before
    assert again.chosen == runs.chosen
    with raises(OptionError, option="work", given=3, expected=1):
        open_runs(runs.work.parent, epochs=3)
    with raises(OptionError, option="targets", given=("shoes",)):
        Runs(runs.work, runs.images, (0,), (1e-2,), {}, 2, ("shoes",))


def test_the_learning_rate_is_chosen_on_validation_images(tmp_path: Path) -> None:
    """By the first seed; other seeds and rows that share the rate use it."""
    slow, fast = 1e-9, 0.3
    made = open_runs(tmp_path, (slow, fast), epochs=20)
    job = {"run": {"method": "linear_probe", "data": str(made.images.many("clothes", 0))}}
    with raises(OptionError, option="seeds", given=1, expected=0):
        made.row("color", 1, job)
    made.row("color", 0, job)
    files = [made.work / "runs" / "color" / f"run-{rate:g}-0" / "result.json" for rate in (slow, fast)]
    scores = [json.loads(file.read_text())["val_accuracy"] for file in files]
    assert scores[0] < scores[1]
    assert made.chosen == {"color": fast}
    assert made.row("color", 1, job)["run"].folder.name == "run-0.3-1"
    assert made.row("other", 1, job, "color")["run"].folder == made.work / "runs" / "other" / "run-0.3-1"


def test_merged_adapters_have_no_head_and_no_target(runs: Runs) -> None:
    """The soup has two of the three adapters of the other tasks, MerA all three; neither that of the target."""
    singles = joint.single_runs(runs, 0)
    others = [read_stored(singles[task].adapter)[0].tensors for task in runs.images.tasks if task != TARGET]
    key = next(key for key in others[0] if key.endswith("up_bias"))
    stored = {}
    for name in ("soup", "mera"):
        [adapter] = read_stored(runs.work / "merged" / f"{name}-{TARGET}-0.safetensors")
        assert adapter.method.name == "pfeiffer"
        stored[name] = adapter.tensors[key]
    biases = [each[key] for each in others]
    torch.testing.assert_close(stored["mera"], torch.stack(biases).mean(0))
    pairs = [(a + b) / 2 for a, b in itertools.combinations(biases, 2)]
    assert sum(torch.allclose(stored["soup"], pair, atol=1e-7) for pair in pairs) == 1


def test_the_domain_is_exchanged_for_outlines(runs: Runs) -> None:
    rate = runs.chosen["mad-x"]
    stacked = runs.work / "runs" / "mad-x" / f"task-{rate:g}-0"
    domain = runs.work / "runs" / "domain" / f"outlines-{runs.chosen['domain']:g}-0"
    images = runs.images.many("outlines", 0) / "test"
    paths = sorted(images.rglob("*.png"))
    by_hand = [each.label for each in open_predictor(stacked, exchange={"mad_x": domain}).predict(paths)]
    expected = sum(label == path.parent.name for label, path in zip(by_hand, paths, strict=True)) / len(paths)
    rows = {row.label: row for row in styles.style_rows(runs, (0,))}
    assert rows[styles.EXCHANGED].accuracies["outlines"] == [expected]
    tensors = [read_stored(path)[0].tensors for path in (stacked, domain)]
    assert any(not torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
