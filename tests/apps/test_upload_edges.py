"""What visitors bring that is just within the limits, or has something in it that nobody sees."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from safetensors.torch import save_file
from veneer.apps.limits import LIMITS
from veneer.apps.uploads import store_adapter, store_photos
from veneer.apps.zip_archives import unpack_zip

import veneer
from tests.raising import raises
from veneer.injection import VeneerError
from veneer.testing.pipelines import tiny_pipeline


def png(color: str = "red") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(held, "PNG")
    return held.getvalue()


def zipped(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, png())
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_image_count_limit_of_a_zip(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths:
        path.write_bytes(png())
    taken, _ = store_photos(paths, tmp_path / "job", replace(LIMITS, photos=3))
    assert len(taken) == 3
    count, _ = unpack_zip(zipped(tmp_path / "a.zip", ["a/1.png", "a/2.png"]), tmp_path / "out", replace(LIMITS, zip_files=2))
    assert count == 2


def test_folder_depth_limit_of_a_zip(tmp_path: Path) -> None:
    deep = "/".join("abcdefgh"[: LIMITS.zip_depth - 1]) + "/x.png"
    count, refused = unpack_zip(zipped(tmp_path / "a.zip", [deep, f"z/{deep}"]), tmp_path / "out")
    assert (count, files(tmp_path / "out")) == (1, [deep])
    assert f"in {LIMITS.zip_depth} folders; expected at most {LIMITS.zip_depth - 1}" in refused[0]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ["cat/a.png", "__MACOSX/cat/a.png", "cat/.a.png", ".trash/a.png"])
    assert unpack_zip(path, tmp_path / "out") == (1, [])
    assert files(tmp_path / "out") == ["cat/a.png"]


def test_rejected_zip_leaves_existing_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with raises(VeneerError, where="name", given="../a.png"):
        unpack_zip(zipped(tmp_path / "a.zip", ["../a.png"]), out)
    assert files(out) == ["mine.txt"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_metadata_is_removed(tmp_path: Path, kind: str) -> None:
    """Color profiles are removed as well, since their text may name a camera or a person."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a", kind, icc_profile=profile, comment=b"home", dpi=(72, 72))
    [taken], _ = store_photos([tmp_path / "a"], tmp_path / "job")
    with Image.open(taken) as found:
        found.load()
        assert found.info == {}


def test_embedding_in_an_image_is_rejected(tmp_path: Path) -> None:
    told = {"name": "toy", "string_to_param": {"*": {"TORCHTENSOR": torch.ones(1, 768).tolist()}}}
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(told).encode()).decode())
    path = tmp_path / "toy.safetensors"
    Image.new("RGB", (32, 32)).save(path, "PNG", pnginfo=info)
    assert veneer.formats.format_of(veneer.formats.read(path)) is not None, "it could be loaded, but not by that name"
    with raises(VeneerError, file="toy.safetensors", given="image", expected=".safetensors"):
        store_adapter(path, tmp_path / "kept", "toy.safetensors")
    assert not (tmp_path / "kept").exists()


def test_names_differing_in_case_stay_distinct(tmp_path: Path) -> None:
    """Some file systems ignore case."""
    first = veneer.attach(tiny_pipeline("sd"), "lora").save(tmp_path / "first.safetensors")
    read = veneer.formats.read(first)
    save_file({k: v + 1 for k, v in read.tensors().items()}, tmp_path / "second.safetensors", dict(read.metadata))
    kept = [
        store_adapter(tmp_path / f"{n}.safetensors", tmp_path / "kept", name) for n, name in (("first", "Toy"), ("second", "toy"))
    ]
    assert [path.name for path in kept] == ["Toy.safetensors", "toy-2.safetensors"]
