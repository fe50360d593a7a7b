"""What the page Classify makes of the metrics of jobs, and small decisions before one begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from veneer.apps import jobs
from veneer.apps.context import Context
from veneer.apps.jobs import Job
from veneer.apps.limits import LIMITS
from veneer.apps.pages.classify.labeled_data import class_root
from veneer.apps.pages.classify.request import ClassifyRequest, check_methods, submit_jobs
from veneer.apps.pages.classify.results import (
    FEW_EPOCHS,
    accuracy_curve,
    comparison,
    describe,
    read_result,
    run_table,
    stamp,
    summarize,
)
from veneer.apps.workspace import Workspace

from tests.raising import raises
from veneer.classification.train.epoch_selection import Epoch
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError


def metrics(method: str, val: float, test: float) -> dict[str, Any]:
    """Those that a page needs, of 3 pictures of one class and 1 of another."""
    return {
        "test_accuracy": test, "val_accuracy": val, "test_interval_95": [test - 0.125, test + 0.125],
        "test": {"confusion": [[2, 1], [0, 1]]}, "chosen": {"epoch": 2}, "trainable_parameters": 1234, "stored_bytes": 5678,
        "data": {"pictures": {"train": 8, "validation": 4, "test": 4}, "classes": ["a", "b"], "notes": []},
        "config": {"method": method}, "model": {"name": "small"},
    }  # fmt: skip


def begun(space: Workspace, data: str, method: str) -> Job:
    job = jobs.create_job(space.jobs, "classify", f"{data} · {method}", ["transfer", data, f"--method={method}"])
    job.run.mkdir()
    return job


def ended(space: Workspace, data: str, method: str, val: float, test: float) -> Job:
    job = begun(space, data, method)
    (job.run / "result.json").write_text(json.dumps(metrics(method, val, test)))
    return job


def test_methods_are_ranked_by_validation_accuracy(tmp_path: Path) -> None:
    """Ranking by test accuracy would favor the luckiest of many methods."""
    space = Workspace(tmp_path)
    ended(space, "pets", "second", 0.75, 0.875)
    first = ended(space, "pets", "first", 0.875, 0.5)
    ended(space, "pets", "third", 0.5, 0.75)
    ended(space, "flowers", "elsewhere", 1.0, 1.0)
    begun(space, "pets", "unfinished")
    table = comparison(first)
    assert [name for name in ("first", "second", "third") if name in table] == sorted(
        ("first", "second", "third"), key=table.index
    )
    assert "elsewhere" not in table
    assert "unfinished" not in table
    assert "37.5% to 62.5%" in table
    assert comparison(ended(space, "cars", "alone", 1.0, 1.0)) == ""


def test_table_updates_when_another_job_ends(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    job = ended(space, "pets", "first", 0.5, 0.5)
    other, before = begun(space, "pets", "second"), stamp(job)
    assert stamp(job) == before
    (other.run / "result.json").write_text(json.dumps(metrics("second", 1, 1)))
    assert stamp(job) != before


def test_earlier_runs_are_listed(tmp_path: Path) -> None:
    """Runs on other images and unfinished runs are included, newest first."""
    space = Workspace(tmp_path)
    first = ended(space, "pets", "first", 0.5, 0.5)
    assert run_table(first) == run_table(None) == ""
    begun(space, "cars", "<b>second")
    table = run_table(first)
    assert table.index("&lt;b&gt;second") < table.index("pets · first (above)")
    assert "50.0%" in table


def test_every_epoch_has_a_tick() -> None:
    """Few epochs are names on the axis, since an axis of numbers would be marked at half epochs."""
    few, many = ([Epoch(n, n * 10, 1.0, 1.0, 0.5) for n in range(1, count + 1)] for count in (FEW_EPOCHS, FEW_EPOCHS + 1))
    assert list(accuracy_curve(few)["epoch"]) == [str(n) for n in range(1, FEW_EPOCHS + 1)]
    assert list(accuracy_curve(many)["epoch"]) == [*range(1, FEW_EPOCHS + 2)]


def test_verdict_is_first_and_escaped(tmp_path: Path) -> None:
    found = read_result(ended(Workspace(tmp_path), "pets", "lora", 0.5, 0.75))
    found["verdict"] = {"outcome": "partly", "summary": "<b>Worse</b> than the probe.", "reasons": ["a"], "advice": ["b"]}
    words = summarize(found)
    assert words.index("Partly learned") < words.index("Accuracy 75.0%")
    assert "&lt;b&gt;Worse&lt;/b&gt;" in words


def test_summary_of_a_finished_run(tmp_path: Path) -> None:
    words = summarize(read_result(ended(Workspace(tmp_path), "pets", "lora", 0.5, 0.75)))
    assert words.startswith("### Accuracy 75.0%")
    assert "interval is **62.5% to 87.5%**" in words
    assert "the most frequent class gives 75.0%" in words, "3 of the 4 pictures are of one class"
    assert "Epoch 2 was selected as the best on 4 validation images (50.0%)" in words
    assert "1,234 trainable parameters; the file has 5,678 bytes" in words


@pytest.mark.parametrize(
    ("rows", "best"),
    [([(0.9, 0.5), (0.8, 0.5)], 1), ([(0.8, 0.5), (0.8, 0.3), (0.8, 0.4)], 2), ([(0.8, 0.5), (0.8, 0.5)], 1)],
)
def test_best_epoch_so_far(tmp_path: Path, rows: list[tuple[float, float]], best: int) -> None:
    epochs = [Epoch(n, n * 10, 1.0, loss, accuracy) for n, (accuracy, loss) in enumerate(rows, 1)]
    assert f"The best so far is epoch {best}, {rows[best - 1][0]:.1%}" in describe(
        begun(Workspace(tmp_path), "pets", "lora"), epochs
    )
    assert "best so far" not in describe(begun(Workspace(tmp_path), "pets", "lora"), epochs[:1])


def test_waiting_jobs_count_against_the_limit(tmp_path: Path) -> None:
    context, space = Context.create(tmp_path), Workspace(tmp_path)
    for _ in range(LIMITS.jobs - 1):
        context.submit(space, "train", "a toy", ["personalize"])
    with raises(VeneerError, where="jobs", given=2, expected=1):
        submit_jobs(context, space, ClassifyRequest(model="bundled", methods=["lora", "bitfit"]))
    assert len(space.all_jobs()) == LIMITS.jobs - 1
    assert len(submit_jobs(context, space, ClassifyRequest(model="bundled", methods=["lora", "lora", " lora"]))[0]) == 1
    assert check_methods(["ssf", "lora", "ssf"], "bundled") == ["ssf", "lora"]


def test_only_data_of_classify_jobs_is_reused(tmp_path: Path) -> None:
    context, space = Context.create(tmp_path), Workspace(tmp_path)
    (tmp_path / "photos").mkdir()
    trained = jobs.create_job(space.jobs, "train", "a toy", ["personalize", str(tmp_path / "photos"), "--concept=<toy>"])
    with raises(OptionError, option="job", given=trained.name):
        submit_jobs(context, space, ClassifyRequest(model="bundled", source="again", job=trained.name))


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (["pets/cat", "pets/dog"], "pets"),
        (["cat", "dog"], "."),
        (["train/cat", "train/dog"], "."),
        (["Training/cat", "Training/dog"], "."),
        (["train/cat", "val/cat"], "."),
    ],
)
def test_class_root(tmp_path: Path, held: list[str], found: str) -> None:
    for name in held:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").touch()
    assert class_root(tmp_path) == tmp_path / found
