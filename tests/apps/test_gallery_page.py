"""The page Gallery: pages of images, settings of one, reuse, and results of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.image_store import ImageStore
from veneer.apps.jobs import create_job
from veneer.apps.pages.gallery import gallery_page
from veneer.apps.pages.gallery.entries import describe_image, finished_runs, run_thumbnails
from veneer.apps.pages.generate.generate_page import form_for_image
from veneer.apps.workspace import Workspace

from tests.raising import raises
from veneer.injection.errors import UnknownName
from veneer.training.report.png_metadata import save_png

SETTINGS = {"prompt": "a <b>cat</b>", "seed": 7, "steps": 2, "guidance": 3.0, "size": [32, 64], "base": "bundled"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "space")


def store(workspace: Workspace, tmp_path: Path, **changed: Any) -> str:
    """Stores an image; returns its name."""
    path = save_png(Image.new("RGB", (64, 32)), tmp_path / "made.png", {**SETTINGS, **changed})
    ImageStore.of(workspace).add(Path(path))
    return ImageStore.of(workspace).files()[0].name


def test_pages_of_images(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, names, number, position, newer, older = gallery_page.show_page(workspace, 0)
    assert (names, number, position) == ([], 0, gallery_page.NO_IMAGES)
    assert not gallery.visible
    monkeypatch.setattr(gallery_page, "PER_PAGE", 2)
    stored = [store(workspace, tmp_path, seed=seed) for seed in range(3)]
    gallery, names, number, position, newer, older = gallery_page.show_page(workspace, 0)
    assert names == [stored[2], stored[1]]
    assert (number, newer.interactive, older.interactive) == (0, False, True)
    assert position.startswith("1 to 2 of 3;")
    _, names, number, _, newer, older = gallery_page.show_page(workspace, 5)
    assert (names, number, newer.interactive, older.interactive) == ([stored[0]], 1, True, False)


def test_details_of_an_image(workspace: Workspace, tmp_path: Path) -> None:
    name = store(workspace, tmp_path, adapters=[{"file": "style", "scale": 0.5}])
    image, html, download, details, selected = gallery_page.show_image(workspace, name)
    assert (image.size, details.visible, selected) == ((64, 32), True, name)
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html
    assert "style × 0.5" in html
    assert "32 × 64" in html
    file = ImageStore.of(workspace).find(name)
    assert Path(download.value["path"] if isinstance(download.value, dict) else download.value).read_bytes() == file.read_bytes()
    with raises(UnknownName, name="../made.png", kind="image"):
        gallery_page.show_image(workspace, "../made.png")
    assert "none: the base model alone" in describe_image(Path(ImageStore.of(workspace).find(store(workspace, tmp_path))))


def test_an_image_fills_the_page_generate(workspace: Workspace, tmp_path: Path) -> None:
    """A control adapter, which that page does not have, is left out with a note."""
    name = store(workspace, tmp_path, adapters=[{"file": "lines", "scale": 1.0}])
    workspace.adapters.mkdir(parents=True)
    (workspace.adapters / "lines.safetensors").write_bytes(b"")
    base, prompt, _, seed, steps, guidance, width, height, count, adapters, *rest = form_for_image(
        workspace, str(ImageStore.of(workspace).find(name))
    )
    assert (base, prompt, seed, steps, guidance, width, height, count) == ("bundled", "a <b>cat</b>", 7, 2, 3.0, 64, 32, 1)
    assert adapters.value == []
    assert "*Control* with lines" in rest[-1]


def test_results_of_finished_runs(workspace: Workspace) -> None:
    kinds = ("train", "control", "classify", "bench")
    done, running = (create_job(workspace.jobs, "train", title, []) for title in ("toy", "late"))
    others = [create_job(workspace.jobs, kind, kind, []) for kind in kinds[1:]]
    for job in (done, *others):
        (job.run / "samples").mkdir(parents=True)
        (job.run / "result.json").write_text(json.dumps({"verdict": {"outcome": "learned"}}))
    Image.new("RGB", (640, 320), "red").save(done.run / "samples" / "00.png")
    jobs = finished_runs(workspace)
    assert {job.kind for job in jobs} == {"train", "control", "classify"}
    assert running not in jobs
    [(image, caption)] = run_thumbnails([done])
    assert (image.size, image.getpixel((0, 0))) == ((320, 160), (255, 0, 0))
    assert caption.startswith("toy · ")
    assert caption.endswith(" · Learned")


def test_page_builds(tmp_path: Path) -> None:
    with AppBlocks():
        view = gallery_page.build(Context.create(tmp_path))
    assert view.again.elem_id == "gallery-again"
