"""Images with several labels on the page Classify: the table of a zip or folder, the command, and the results of each label."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from veneer.apps.classifier_cache import ClassifierCache
from veneer.apps.context import Context
from veneer.apps.pages.classify import classify_page
from veneer.apps.pages.classify.request import ClassifyRequest, submit_jobs
from veneer.apps.pages.classify.results import comparison, result_values
from veneer.apps.workspace import Workspace

from tests.classification.small import CLASSES, color_table, model_folder
from tests.raising import raises
from veneer.classification.data.sources import open_source
from veneer.cli import main
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder(tmp_path_factory.mktemp("models"), "vit"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return color_table(tmp_path / "colors", count=12).parent


def zipped(path: Path, images: Path, tables: Mapping[str, str], places: Mapping[str, str] = {}) -> str:
    """A zip of the images of a folder, at `places` in it, and of tables."""
    with zipfile.ZipFile(path, "w") as archive:
        for image in sorted(images.glob("*.png")):
            archive.write(image, places.get(image.name, image.name))
        for name, text in tables.items():
            archive.writestr(name, text)
    return str(path)


def labeled(file: str, vit: str = "bundled") -> ClassifyRequest:
    return ClassifyRequest("zip", file, model=vit, methods=["bitfit"], epochs=2, batch=8, augment="none", multi_label=True)


def test_a_run_from_the_zip_to_the_scores_of_each_label(tmp_path: Path, vit: str) -> None:
    folder = color_table(tmp_path / "colors").parent
    file = shutil.make_archive(str(tmp_path / "my colors"), "zip", tmp_path, "colors")
    context, workspace = Context.create(tmp_path / "studio"), Workspace(tmp_path / "studio")
    (job,), left_out = submit_jobs(context, workspace, labeled(file, vit))
    assert not left_out
    assert "--multi-label" in job.command
    assert labels_of(Path(job.command[1])) == labels_of(folder / "labels.csv")
    assert main([*job.command, "--out", str(job.run), "--resume"]) in (0, None)
    words, labels, _, compared, classes, curves, *_ = result_values(job)
    scores = json.loads((job.run / "result.json").read_text())
    assert f"### Mean average precision {scores['test_map']:.1%}" in words
    for name in CLASSES:
        assert f"<td>{name}</td><td>{scores['test']['average_precision'][name]:.1%}</td>" in labels
    assert (classes.visible, classes.label) == (True, "Average precision of each label")
    assert curves.label == "Loss and mean average precision"
    red = next(path for path in Path(job.command[1]).rglob("*.png"))
    probabilities = classify_page.classify(workspace, ClassifierCache(), job.name, str(red))
    assert probabilities is not None
    assert set(probabilities) == set(CLASSES)
    assert classify_page._view_values(job)[4].label == classify_page.PREDICTED[True]

    again = replace(labeled("", vit), source="again", job=job.name, multi_label=False)
    (other,), _ = submit_jobs(context, workspace, again)
    assert other.command[1:2] == job.command[1:2]
    assert "--multi-label" in other.command, "as in the run whose images they are"
    assert compared == comparison(job) == ""


def labels_of(data: Path) -> dict[str, str]:
    source = open_source(data, multi_label=True)
    return {Path(each.name).name: source.label_text(each) for each in source.examples}


def test_paths_of_the_table_are_those_of_the_zip(tmp_path: Path, images: Path) -> None:
    """Files get safe names, and the table starts at its own folder; unusable and unnamed images are reported."""
    (images / "1.png").write_text("no image")
    rows = "path,labels,split\nin/a b.png,cat;dog,train\nin\\\\2.png,dog,test\nin/1.png,dog,train\n./in/3.png,cat,train\n"
    places = {"0.png": "top/in/a b.png", **{f"{n}.png": f"top/in/{n}.png" for n in range(1, 12)}}
    file = zipped(tmp_path / "a.zip", images, {"top/labels.csv": rows.replace("\\\\", "\\"), "top/notes.csv": "x"}, places)
    context, workspace = Context.create(tmp_path / "studio"), Workspace(tmp_path / "studio")
    (job,), left_out = submit_jobs(context, workspace, labeled(file))
    source = open_source(job.command[1], multi_label=True)
    assert {each.name: (source.label_text(each), each.split) for each in source.examples} == {
        "top/in/a-b.png": ("cat|dog", "train"),
        "top/in/2.png": ("dog", "test"),
        "top/in/3.png": ("cat", "train"),
    }
    assert len(left_out) == 2
    assert left_out[0].startswith("1.png")
    assert left_out[1] == "8 images that top/labels.csv does not name"


@pytest.mark.parametrize(
    ("tables", "data"),
    [
        ({}, {"where": "table", "given": ()}),
        ({"one.csv": "path,labels\n0.png,a", "two.csv": ""}, {"where": "table", "given": ("one.csv", "two.csv")}),
        ({"labels.csv": "path,labels\n0.png,a\n/etc/1.png,b"}, {"where": "path", "given": ("line 3: /etc/1.png",)}),
        ({"labels.csv": "path,labels\n0.png,a\n../1.png,b"}, {"where": "path", "given": ("line 3: ../1.png",)}),
        ({"labels.csv": "path,labels\n0.png,a\nnone.png,b"}, {"where": "path", "given": ("line 3: none.png",)}),
        ({"labels.csv": "one,two,three,four\n"}, {"file": "labels.csv", "where": "heading"}),
        ({"labels.csv": "path,labels\n0.png,a\n1.png,a\n"}, {"where": "classes", "given": ("a",)}),
        ({"labels.csv": "path,labels\n0.png,a;b\n1.png,\n"}, {"file": "the zip", "where": "lines"}),
        ({"labels.csv": "path,labels\n" * 1_500_000}, {"where": "table_bytes", "file": "labels.csv"}),
    ],
)
def test_zips_with_an_invalid_table_submit_no_job(
    tmp_path: Path, images: Path, tables: dict[str, str], data: dict[str, object]
) -> None:
    context, workspace = Context.create(tmp_path / "studio"), Workspace(tmp_path / "studio")
    with raises(VeneerError, **data) as caught:
        submit_jobs(context, workspace, labeled(zipped(tmp_path / "a.zip", images, tables)))
    assert str(tmp_path) not in str(caught.value)
    assert not workspace.all_jobs()
    assert not list(workspace.datasets.glob("*"))


def test_a_folder_with_a_table(tmp_path: Path, images: Path) -> None:
    context, workspace = Context.create(tmp_path / "studio"), Workspace(tmp_path / "studio")
    request = replace(labeled(""), source="folder", folder=str(images))
    (job,), _ = submit_jobs(context, workspace, request)
    assert job.command[1] == str(images / "labels.csv")
    assert job.title.startswith("colors")
    (images / "labels.csv").unlink()
    with raises(VeneerError, where="classes", file=images) as caught:
        submit_jobs(context, workspace, request)
    assert "labels.csv" in str(caught.value), "one folder for each class would not help"


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"methods": ["bitfit", "tip_adapter"]}, {"option": "method", "given": "tip_adapter"}),
        ({"model": "bundled_clip", "methods": ["coop"]}, {"option": "model", "given": "bundled_clip"}),
        ({"shots": 3}, {"option": "shots", "given": 3}),
    ],
)
def test_what_needs_one_label_per_image(tmp_path: Path, images: Path, change: dict[str, object], data: dict[str, object]) -> None:
    context, workspace = Context.create(tmp_path / "studio"), Workspace(tmp_path / "studio")
    request = replace(labeled(zipped(tmp_path / "a.zip", images, {"labels.csv": "path,labels\n0.png,a;b"})), **change)
    with raises(OptionError, **data):
        submit_jobs(context, workspace, request)
    assert not workspace.all_jobs()


def test_digits_have_one_label(tmp_path: Path) -> None:
    """The checkbox is hidden for them, whatever it had before."""
    (job,), _ = submit_jobs(Context.create(tmp_path), Workspace(tmp_path), replace(labeled(""), source="digits"))
    assert "--multi-label" not in job.command
    assert [part.label or part.info for part in classify_page.label_fields(True)] == [
        classify_page.ZIP_LABELS[True],
        classify_page.FOLDER_HELP[True],
    ]
