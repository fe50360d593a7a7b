"""Generated images of a user: bounded, in pages, and separate from other users'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from veneer.apps.image_store import ImageStore, settings_of, store_images
from veneer.apps.limits import LIMITS
from veneer.apps.workspace import Workspace

from tests.raising import raises
from veneer.injection.errors import UnknownName
from veneer.training.report.png_metadata import save_png


def made(folder: Path, number: int, side: int = 8) -> Path:
    """A generated image of one color, with its settings."""
    path = folder / f"made-{number}.png"
    save_png(Image.new("RGB", (side, side), (number, 0, 0)), path, {"prompt": f"image {number}", "seed": number})
    return path


def seeds(store: ImageStore) -> list[int]:
    return [settings_of(path)["seed"] for path in store.files()]


def test_the_oldest_images_beyond_the_limit_are_deleted(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", replace(LIMITS, gallery_images=3))
    for number in range(5):
        store.add(made(tmp_path, number))
    assert seeds(store) == [4, 3, 2], "newest first"
    size = made(tmp_path, 9).stat().st_size
    store = ImageStore(tmp_path / "images", replace(LIMITS, gallery_bytes=2 * size + size // 2))
    store.add(made(tmp_path, 9))
    assert seeds(store) == [9, 4]
    assert not [path for path in store.folder.iterdir() if path.suffix != ".png"]


def test_pages(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    assert store.page(0, 2) == ([], 0, 1)
    for number in range(5):
        store.add(made(tmp_path, number))
    found = {number: store.page(number, 2) for number in (-1, 0, 1, 2, 7)}
    shown = {number: [settings_of(path)["seed"] for path in files] for number, (files, *_) in found.items()}
    assert shown == {-1: [4, 3], 0: [4, 3], 1: [2, 1], 2: [0], 7: [0]}
    assert [(number, pages) for _, number, pages in found.values()] == [(0, 3), (0, 3), (1, 3), (2, 3), (2, 3)]


def test_only_images_with_a_prompt_are_stored_and_the_disk_is_not_filled(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "map.png", {"condition": "canny"})
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    for name in ("map.png", "bare.png", "missing.png"):
        store.add(tmp_path / name)
    assert store.files() == []
    full = replace(LIMITS, disk_free=2**62)
    ImageStore(tmp_path / "images", full).add(made(tmp_path, 1))
    assert store.files() == []


def test_images_of_a_generation_are_stored_once_as_they_come(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "space")
    items = [(str(made(tmp_path, number)), f"seed {number}") for number in range(3)]
    updates = store_images(workspace, [([], "0 of 3"), (items[:1], "1 of 3"), ([items[2], *items[:2]], "3 of 3")])
    assert next(updates) == ([], "0 of 3")
    assert next(updates) == (items[:1], "1 of 3")
    assert seeds(ImageStore.of(workspace)) == [0], "a stopped generation keeps what it has"
    assert next(updates)[1] == "3 of 3"
    assert sorted(seeds(ImageStore.of(workspace))) == [0, 1, 2]


@pytest.mark.parametrize("name", ["../secret.png", "", "00000000000000000000.png"])
def test_a_name_is_looked_up_among_the_images_of_the_user(tmp_path: Path, name: str) -> None:
    mine, other = (ImageStore.of(Workspace(tmp_path / "space", user)) for user in ("ann", "ben"))
    mine.add(made(tmp_path, 1))
    made(mine.folder.parent, 2).rename(mine.folder.parent / "secret.png")
    [file] = mine.files()
    assert mine.find(file.name) == file
    with raises(UnknownName, name=name, kind="image"):
        mine.find(name)
    with raises(UnknownName, name=file.name, kind="image"):
        other.delete(file.name)
    mine.delete(file.name)
    assert mine.files() == []
