"""The page Classify: what it begins, what it shows while a job learns and at the end, and whom it lets look where."""

from __future__ import annotations

import html
import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from veneer.apps import jobs
from veneer.apps.classifier_cache import MAX_CLASSIFIERS, ClassifierCache
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.limits import LIMITS
from veneer.apps.pages.classify import classify_page
from veneer.apps.pages.classify.request import ClassifyRequest, resolve_model, submit_jobs
from veneer.apps.pages.classify.results import accuracy_curve, describe, result_values, stamp
from veneer.apps.pages.shared.job_view import delete_job
from veneer.apps.workspace import Workspace

from tests.classification.small import CLASSES, image_folder, model_folder
from tests.classification.transformers_folders import transformers_folder
from tests.raising import raises
from veneer.classification.train.epoch_selection import read_epochs
from veneer.cli import main
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError, StateError, UnknownName


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of three color classes in one outer folder, as file managers create it."""
    parent = tmp_path_factory.mktemp("given")
    image_folder(parent / "pets", count=12)
    return Path(shutil.make_archive(str(parent / "my pets"), "zip", parent, "pets"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder(tmp_path_factory.mktemp("models"), "vit"))


@pytest.fixture
def wanted(pets: Path, vit: str) -> ClassifyRequest:
    return ClassifyRequest(
        source="zip", file=str(pets), model=vit, methods=["linear_probe", "bitfit"], epochs=3, batch=8, augment="none"
    )


def test_a_login_reads_models_of_transformers_from_the_hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = transformers_folder(tmp_path / "models", "vit")
    assert resolve_model(Workspace(tmp_path), "hf:models/vit") == f"hf:{folder.resolve()}"
    anna = Workspace(tmp_path, "anna")
    assert resolve_model(anna, "hf:user/model") == "hf:user/model"
    for name in (f"hf:{folder}", "hf:models/vit", f"hf:{tmp_path}/none"):
        with raises(OptionError, option="model", given=name, expected="hf:USER/REPO"):
            resolve_model(anna, name)


def run(job: jobs.Job) -> None:
    """Runs the worker in this process."""
    assert main([*job.command, "--out", str(job.run), "--resume"]) in (0, None), job.metadata


def test_each_method_is_a_job_with_results(tmp_path: Path, wanted: ClassifyRequest) -> None:
    context, workspace = Context.create(tmp_path), Workspace(tmp_path)
    begun, left_out = submit_jobs(context, workspace, wanted)
    assert [job.metadata["title"] for job in begun] == ["my-pets · linear_probe", "my-pets · bitfit"]
    assert not left_out
    data = Path(begun[0].command[1])
    assert {path.name for path in data.iterdir()} == set(CLASSES), "the folder around them is gone"
    assert begun[1].command[1] == str(data), "the same pictures, so that the methods can be compared"
    assert result_values(begun[0])[0] == ""
    for job in begun:
        run(job)
    words, labels, accuracy, compared, confusion, curves, mistakes, every, files = result_values(begun[0])
    assert labels == ""
    assert "interval is **" in words
    tested = json.loads((begun[0].run / "splits.json").read_text())["test"]
    assert f"Measured on {len(tested)} test images" in words
    assert json.loads((begun[0].run / "result.json").read_text())["verdict"]["summary"] in html.unescape(words)
    assert (accuracy.visible, curves.visible) == (False, True), "the accuracy is in the figure"
    assert len(accuracy_curve(read_epochs(begun[0].run))) == 3
    assert all(isinstance(sheet.value, dict) for sheet in (confusion, curves, mistakes)), "pictures in Gradio's cache"
    assert compared.count("<tr>") == every.count("<tr>") == 3
    assert {Path(each["path"]).name for each in files.value} == {"adapter.safetensors", "model.json"}

    answers = ClassifierCache()
    red = data / "red" / "0.png"
    found = classify_page.classify(workspace, answers, begun[0].name, str(red))
    assert found is not None
    assert set(found) == set(CLASSES)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    broken = tmp_path / "broken.png"
    broken.write_text("<b>no picture</b>")
    with raises(VeneerError, file=broken.name):
        classify_page.classify(workspace, answers, begun[0].name, str(broken))
    for number in range(MAX_CLASSIFIERS + 1):
        answers.classify(shutil.copytree(begun[0].run, tmp_path / f"copy-{number}"), red)
    assert len(answers._predictors) == MAX_CLASSIFIERS

    again, _ = submit_jobs(context, workspace, replace(wanted, source="again", job=begun[0].name, methods=["lora+ssf"]))
    assert again[0].command[1] == str(data)
    assert again[0].metadata["title"] == "my-pets · lora+ssf"
    delete_job(workspace, begun[0].name)
    assert data.is_dir(), "others learn from them"


def test_accuracy_is_shown_during_training(tmp_path: Path, wanted: ClassifyRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after its second epoch of twenty."""
    from veneer.training.loop.trainer import Trainer

    job = submit_jobs(Context.create(tmp_path), Workspace(tmp_path), replace(wanted, methods=["bitfit"], epochs=20))[0][0]
    before, tell = stamp(job), Trainer._report

    def stopping(self: Trainer, *rest: Any) -> None:
        tell(self, *rest)
        if len(read_epochs(job.run)) == 2:
            self.stop()

    monkeypatch.setattr(Trainer, "_report", stopping)
    run(job)
    (job.folder / "stop").touch()
    epochs = read_epochs(job.run)
    assert stamp(job) != before
    assert describe(job, epochs).startswith(f"Epoch 2: validation accuracy **{epochs[1].val_accuracy:.1%}**")
    words, _, accuracy, _, confusion, *_, files = result_values(job)
    assert "at the end" in words
    assert accuracy.visible
    assert not confusion.visible
    assert len(files.value) == 2, "the trained weights can be downloaded"
    assert classify_page.classify(
        Workspace(tmp_path), ClassifierCache(), job.name, str(next(Path(job.command[1]).rglob("*.png")))
    )


def test_invalid_requests_submit_no_job(tmp_path: Path, wanted: ClassifyRequest, pets: Path) -> None:
    context, alone, named = Context.create(tmp_path), Workspace(tmp_path), Workspace(tmp_path, "ann")
    folder = str(image_folder(tmp_path / "colors", count=2))
    flat = tmp_path / "flat.zip"
    with zipfile.ZipFile(flat, "w") as archive:
        archive.write(next(Path(folder).rglob("*.png")), "only/0.png")
    many = ["lora", "bitfit", "ssf", "vpt", "full", "oft", "boft", "loha", "lokr", "dora"]
    changes: tuple[tuple[dict[str, object], dict[str, object]], ...] = (
        ({"methods": []}, {"option": "methods", "given": ()}),
        ({"methods": ["lora", "controlnet"]}, {"option": "methods", "given": "controlnet"}),
        ({"methods": ["--out"]}, {"option": "methods", "given": "--out"}),
        ({"model": "../secret"}, {"where": "timm", "given": "../secret"}),
        ({"model": "timm:no_such_net"}, {"where": "timm", "given": "no_such_net"}),
        ({"model": "open_clip:none"}, {"where": "open_clip", "given": "none"}),
        ({"epochs": LIMITS.epochs + 1}, {"option": "epochs", "given": LIMITS.epochs + 1}),
        ({"batch": -1}, {"option": "batch", "given": -1}),
        ({"epochs": None}, {"option": "epochs", "given": None}),
        ({"seed": None}, {"option": "seed", "given": None}),
        ({"rate": None}, {"option": "learning rate", "given": None}),
        ({"rate": math.nan}, {"option": "learning rate", "given": math.nan}),
        ({"size": "8"}, {"option": "size", "given": "8"}),
        ({"augment": "<b>"}, {"option": "augmentation", "given": "<b>"}),
        ({"file": None}, {"option": "file", "given": None}),
        ({"file": str(flat)}, {"where": "classes", "given": ("only",), "expected": 2}),
        ({"source": "folder", "folder": " "}, {"option": "folder", "given": ""}),
        ({"source": "folder", "folder": str(tmp_path / "gone")}, {"file": str(tmp_path / "gone"), "given": "missing"}),
        ({"source": "again", "job": "../x"}, {"name": "../x", "kind": "job"}),
        ({"methods": many}, {"where": "jobs", "given": len(many), "expected": LIMITS.jobs}),
    )
    for change, data in changes:
        with raises(VeneerError, **data):
            submit_jobs(context, alone, replace(wanted, **change))  # type: ignore[arg-type]
    with raises(OptionError, option="source", given="folder"):
        submit_jobs(context, named, replace(wanted, model="bundled", source="folder", folder=folder))
    with raises(VeneerError, where="timm"):
        submit_jobs(context, named, wanted)  # a folder of this machine as the model
    assert not alone.all_jobs()
    assert not list(alone.datasets.glob("*")), "nothing stays of a zip that is of no use"
    assert submit_jobs(context, alone, replace(wanted, source="folder", folder=folder))[0][0].command[1] == folder
    mine = submit_jobs(context, alone, wanted)[0][0]
    with raises(UnknownName, name=mine.name, kind="job"):
        classify_page.classify(named, ClassifierCache(), mine.name, str(next(Path(folder).rglob("*.png"))))
    with raises(UnknownName, name=mine.name, kind="job"):
        submit_jobs(context, named, replace(wanted, model="bundled", source="again", job=mine.name))
    with raises(StateError, where=mine.run.name, given="untrained"):
        classify_page.classify(alone, ClassifierCache(), mine.name, str(next(Path(folder).rglob("*.png"))))


def test_page_builds_and_lists_supported_methods(tmp_path: Path) -> None:
    with AppBlocks():
        classify_page.build(Context.create(tmp_path))
    assert "folder" in dict(map(reversed, classify_page.source_choices(Workspace(tmp_path))))  # type: ignore[arg-type]
    assert "folder" not in dict(map(reversed, classify_page.source_choices(Workspace(tmp_path, "ann"))))  # type: ignore[arg-type]
    assert [part.visible for part in classify_page.source_fields("zip")] == [True, False, True, False]
    assert [part.visible for part in classify_page.source_fields("digits")] == [False, False, False, True]
    clip = classify_page.supported_methods("bundled_clip", ["lora", "vpt+ssf"])
    assert "coop" in dict(clip.choices)
    assert clip.value == ["lora", "vpt+ssf"]
    assert classify_page.supported_methods("bundled", ["coop", "lora"]).value == ["lora"]
    assert len(result_values(None)) == len(result_values(jobs.Job(tmp_path / "gone")))
