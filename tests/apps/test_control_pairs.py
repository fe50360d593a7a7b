"""Control training on the user's own pairs of a zip."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from veneer.apps.context import Context
from veneer.apps.pages.control.pairs import save_pairs
from veneer.apps.pages.control.training import ControlTrainingRequest, start_job
from veneer.apps.pages.shared.job_view import delete_job
from veneer.apps.workspace import Workspace

from tests.apps.test_personalize_page import until_ended
from tests.methods.controls import picture
from tests.raising import raises
from veneer.control.image_pairs import find_pairs
from veneer.injection import OptionError, VeneerError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.image_io import DataError


def png(number: int, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    picture(number, side).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def pairs(root: str = "", count: int = 2) -> dict[str, bytes]:
    return {f"{root}{kind}/photo {n}.png": png(n + 10 * len(kind)) for n in range(count) for kind in ("images", "conditions")}


@pytest.mark.parametrize("root", ["", "my pairs/"])
def test_pairs_of_a_zip(root: str, tmp_path: Path) -> None:
    """In the top folder or in one folder of the zip; an image without a partner is reported."""
    workspace = Workspace(tmp_path / "app")
    files = {**pairs(root), f"{root}images/alone.png": png(7), f"{root}notes.md": b"text"}
    files = {name: data for name, data in files.items() if root == "" or not name.endswith(".md")}
    folder, left_out = save_pairs(workspace, archive(tmp_path / "pairs.zip", files))
    assert folder.parent == workspace.datasets
    found = find_pairs(folder).pairs
    assert [pair.photo.path.name for pair in found] == ["photo-0.png", "photo-1.png"]
    assert [pair.map.path.parent.name for pair in found] == ["conditions"] * 2
    assert any("alone" in line for line in left_out)
    assert not any(str(tmp_path) in line for line in left_out)


@pytest.mark.parametrize(
    ("files", "error", "data"),
    [
        (pairs(count=1), OptionError, {"option": "pairs", "given": 1, "expected": 2}),
        ({"images/a.png": png(1), "images/b.png": png(2)}, DataError, {"where": "maps", "given": ()}),
        ({"../images/a.png": png(1)}, VeneerError, {"where": "name"}),
        ({"a.txt": b""}, VeneerError, {"where": "zip_files", "given": 0}),
    ],
    ids=["one pair", "no maps", "outside", "no images"],
)
def test_zips_without_pairs_leave_nothing(
    files: Mapping[str, bytes], error: type[VeneerError], data: dict[str, object], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path / "app")
    with raises(error, **data) as caught:
        save_pairs(workspace, archive(tmp_path / "pairs.zip", files))
    assert str(tmp_path) not in str(caught.value)
    assert not [*workspace.datasets.iterdir()]


def test_a_method_that_follows_images_has_no_pairs(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    form = ControlTrainingRequest("ip_adapter", "image", pairs=str(archive(tmp_path / "pairs.zip", pairs())))
    with raises(OptionError, option="pairs", where="ip_adapter"):
        start_job(context, context.workspace(None), form)


def test_train_on_pairs(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    context = Context.create(tmp_path / "app")
    workspace = context.workspace(None)
    path = archive(tmp_path / "pairs.zip", pairs(count=3))
    form = ControlTrainingRequest("t2i_adapter", "canny", str(tmp_path / "base"), 2, caption="a toy", pairs=str(path))
    job, left_out = start_job(context, workspace, form)
    assert "--condition=pairs" in job.command
    assert left_out == []
    until_ended(context, job)
    assert job.state == "done", job.log()
    delete_job(workspace, job.name)
    assert not [*workspace.datasets.iterdir()]
