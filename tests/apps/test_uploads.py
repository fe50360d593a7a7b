"""What visitors bring, at its worst: nothing lands elsewhere, nothing costs more than the limits, and each refusal says why."""

from __future__ import annotations

import io
import json
import pickle
import stat
import struct
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from veneer.apps.limits import LIMITS, Limits
from veneer.apps.uploads import MAX_SHORT_SIDE, load_image, store_adapter, store_photos
from veneer.apps.zip_archives import unpack_zip

import veneer
from tests.methods.controls import picture as drawn
from tests.raising import raises
from veneer.injection import VeneerError
from veneer.injection.errors import LoadError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.image_io import PhotoError, read_photo


def png(size: tuple[int, int] = (32, 32), color: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, color).save(held, "PNG")
    return held.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A complete single-color PNG of few bytes, since rows of zeros compress well."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row, rows = zlib.compressobj(9), b"\0" * (width // 8 + 1), []
    for _ in range(height):
        rows.append(packer.compress(row))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zipped(path: Path, entries: dict[str | zipfile.ZipInfo, bytes], way: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", way) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
ANIMATED = io.BytesIO()
Image.new("RGB", (32, 32), "red").save(ANIMATED, "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")])


@pytest.mark.parametrize(
    ("name", "data", "given"),
    [
        ("a.png", b"hello, I am text", "text"),
        ("a.png", SVG, "SVG"),
        ("a.jpg", b"<!DOCTYPE html><html><script>alert(1)</script>", "HTML"),
        ("a.png", png()[:-30], "damaged"),
        ("a.png", png()[:20], "damaged"),
        ("a.png", b"", "empty"),
        ("a.png", huge_png(20_000, 15_000), 300_000_000),
        ("<img src=x onerror=alert(1)>.png", b"x", "text"),
    ],
)
def test_invalid_images_are_rejected_by_name(tmp_path: Path, name: str, data: bytes, given: object) -> None:
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / name
    path.write_bytes(data)
    with raises(PhotoError, file=name, given=given) as caught:
        load_image(path)
    assert str(caught.value).startswith(name), "without the folder, which is the server's"
    assert str(tmp_path) not in str(caught.value)
    with raises(VeneerError, where="photos", given=0):
        store_photos([path], tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_large_file_is_rejected_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x" * (3 * 2**20))
    with raises(PhotoError, file="a.png", where="photo_bytes", given=3 * 2**20, expected=2 * 2**20) as caught:
        load_image(tmp_path / "a.png", replace(LIMITS, photo_bytes=2 * 2**20))
    assert "max_bytes" not in str(caught.value), "nothing that only code can do"


def test_huge_image_has_few_bytes() -> None:
    assert len(huge_png(20_000, 15_000)) < 100_000


def test_images_are_stored_under_safe_names_and_reencoded(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20), "red").save(folder / "..;rm -rf $HOME.jpg", exif=exif)
    (folder / "b.gif").write_bytes(ANIMATED.getvalue())
    Image.new("RGB", (3 * MAX_SHORT_SIDE, 2 * MAX_SHORT_SIDE), "green").save(folder / "large.png", comment="x")
    (folder / "猫.png").write_bytes(png())
    (folder / "no.png").write_text("text")
    taken, refused = store_photos(sorted(folder.iterdir()), tmp_path / "job")
    assert sorted(p.name for p in taken) == ["001-rm--rf-HOME.png", "002-b.png", "003-large.png", "005-猫.png"]
    assert len(refused) == 1
    assert refused[0].startswith("no.png: text")
    first = Image.open(taken[0])
    assert (first.size, first.getexif(), b"home" in taken[0].read_bytes()) == ((20, 40), {}, False)
    assert read_photo(taken[1]).getpixel((0, 0)) == (255, 0, 0), "the first frame"
    assert read_photo(taken[2]).size == (MAX_SHORT_SIDE * 3 // 2, MAX_SHORT_SIDE)
    with raises(VeneerError, where="photos", given=5, expected=2):
        store_photos(sorted(folder.iterdir()), tmp_path / "more", Limits(photos=2))


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/etc/out.png", "C:\\out.png", "c:/a/out.png", "..\\..\\out.png"]
)
def test_zips_with_paths_outside_are_rejected(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "a.zip", {"cat/a.png": png(), name: png()})
    with raises(VeneerError, where="name", given=name.replace("\\", "/")):
        unpack_zip(path, tmp_path / "in" / "here")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "in"][: 1 + (tmp_path / "in").exists()]


def test_other_entries_are_rejected_with_reasons(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    inner = zipped(tmp_path / "inner.zip", {"cat/a.png": png()}).read_bytes()
    given = {
        "cat/a.png": png(), "__MACOSX/cat/._a.png": b"x", "cat/.hidden.png": b"x", "cat/text.png": b"hello", link: b"/etc/passwd",
        "cat/svg.png": SVG, "cat/inner.zip": inner, "cat/huge.png": huge_png(20_000, 15_000), "cat/nul\0.exe.png": png(),
        "a/b/c/d/e/f/g.png": png(), f"cat/{'n' * 3000}.png": png(), "cat/notes.txt": b"x",
    }  # fmt: skip
    count, refused = unpack_zip(zipped(tmp_path / "a.zip", given), tmp_path / "out")
    kept = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert kept == ["cat/a.png", f"cat/{'n' * 76}.png"]
    assert count == 2
    told = " ".join(refused)
    for why in (
        "text.png: text",
        "a symbolic link",
        "an SVG drawing",
        "inner.zip: not an image",
        "300,000,000 pixels",
        "folders",
        "notes.txt",
    ):
        assert why in told
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_classes_stay_distinct_and_equal_in_every_split(tmp_path: Path) -> None:
    names = ["猫", "犬", "Cat", "cat", "a b", "a-b", "😀", "😁", "con", "กิน", "กัน", "é", "n" * 300, "n" * 299]
    given: dict[str | zipfile.ZipInfo, bytes] = {}
    for split, order in (("train", names), ("val", names[::-1])):
        for name in order:
            given[f"{split}/{name}/1.png"] = png(color=(names.index(name), 0, 0))
    count, _ = unpack_zip(zipped(tmp_path / "a.zip", given), tmp_path / "out")
    assert count == 2 * len(names)
    found = {
        s: {p.name: read_photo(p / "1.png").getpixel((0, 0)) for p in (tmp_path / "out" / s).iterdir()} for s in ("train", "val")
    }
    assert found["train"] == found["val"]
    assert sorted(found["train"].values()) == [(i, 0, 0) for i in range(len(names))]
    assert len({name.casefold() for name in found["train"]}) == len(names), "on a file system that knows no case too"
    assert {"猫", "犬"} <= found["train"].keys()


def test_many_equal_names_are_numbered_fast(tmp_path: Path) -> None:
    given: dict[str | zipfile.ZipInfo, bytes] = {"x/a b.png": png(), "x/a-b.png": png(), "x/A-B.PNG": png(), "x/a--b.png": png()}
    given |= {f"y/{'?' * n}a.png": png() for n in range(1, 500)}
    count, _ = unpack_zip(zipped(tmp_path / "a.zip", given), tmp_path / "out")
    assert count == len(list((tmp_path / "out").rglob("*.*"))) == 503
    assert {"a-b.png", "a-b-2.png", "A-B-2.PNG"} & {p.name for p in (tmp_path / "out" / "x").iterdir()}


def bombs(path: Path) -> Path:
    return zipped(path, {f"x/{n}.png": b"\0" * 2**22 for n in range(4)})


def test_zip_bombs_stay_within_the_limits(tmp_path: Path) -> None:
    path = bombs(tmp_path / "a.zip")
    assert path.stat().st_size < 50_000
    with raises(VeneerError, where="zip_bytes", expected=10_000_000):
        unpack_zip(path, tmp_path / "out", replace(LIMITS, zip_bytes=10_000_000))
    tracemalloc.start()
    with raises(VeneerError, where="zip_files", given=0) as caught:
        unpack_zip(path, tmp_path / "out", replace(LIMITS, photo_bytes=1_000_000))
    assert "1,000,000" in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert not (tmp_path / "out").exists()
    lies = bytearray(path.read_bytes())
    at = lies.find(b"PK\x01\x02")
    while at >= 0:  # each claims 100 bytes
        lies[at + 24 : at + 28] = struct.pack("<I", 100)
        at = lies.find(b"PK\x01\x02", at + 4)
    (tmp_path / "lies.zip").write_bytes(lies)
    with raises(VeneerError, where="zip", given="unreadable"):
        unpack_zip(tmp_path / "lies.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing stays of what was refused"


def test_too_many_entries_are_rejected_before_reading(tmp_path: Path) -> None:
    one = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0) + b"a.png"
    table = one * 200_000
    path = tmp_path / "many.zip"
    path.write_bytes(table + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(table), 0, 0))
    start = time.monotonic()
    tracemalloc.start()
    with raises(VeneerError, where="entries"):
        unpack_zip(path, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    assert time.monotonic() - start < 5
    few = zipped(tmp_path / "few.zip", {f"x/{n}.png": png() for n in range(11)})
    with raises(VeneerError, where="zip_files", given=11, expected=10):
        unpack_zip(few, tmp_path / "out", replace(LIMITS, zip_files=10))


def test_invalid_zips(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    whole = zipped(path, {"x/a.png": png(), "x/b.png": png()}).read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.find(b"PK\x01\x02") + 8] |= 1
    broken = bytearray(whole)
    broken[45:60] = b"\xff" * 15
    wrong_way = bytearray(whole)
    wrong_way[whole.find(b"PK\x01\x02") + 10] = zipfile.ZIP_LZMA
    for data, where, given in [
        (b"PK\x03\x04nothing", "zip", "unreadable"),
        (b"", "zip", "unreadable"),
        (whole[:-40], "zip", "unreadable"),
        (bytes(broken), "zip", "unreadable"),
        (bytes(encrypted), "zip", "encrypted"),
        (bytes(wrong_way), "compression", zipfile.ZIP_LZMA),
    ]:
        path.write_bytes(data)
        with raises(VeneerError, where=where, given=given):
            unpack_zip(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    attachment = veneer.attach(tiny_pipeline("sd"), "lora")
    return attachment.save(tmp_path_factory.mktemp("adapter") / "mine.safetensors")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, ("/tmp/veneer-was-here",))


def test_adapters(tmp_path: Path, adapter: Path) -> None:
    kept = tmp_path / "kept"
    first = store_adapter(adapter, kept, "../../my file.safetensors")
    assert first == kept / "my-file.safetensors"
    assert first.read_bytes() == adapter.read_bytes()
    assert store_adapter(adapter, kept, "my file.safetensors") == first, "the same again"
    other = tmp_path / "other.safetensors"
    tensors = veneer.formats.read(adapter).tensors()
    save_file({k: v + 1 for k, v in tensors.items()}, other, dict(veneer.formats.read(adapter).metadata))
    second = store_adapter(other, kept, "MY FILE.safetensors")
    assert second.name == "MY-FILE-2.safetensors", "what is there stays"
    with raises(VeneerError, where="adapters", given=2, expected=2):
        store_adapter(other, kept, "third", replace(LIMITS, adapter_files=2))
    with raises(VeneerError, file="third", where="file_bytes", expected=10):
        store_adapter(other, kept, "third", replace(LIMITS, file_bytes=10))
    assert len(list(kept.iterdir())) == 2


def test_invalid_adapters_are_rejected_without_unpickling(tmp_path: Path) -> None:
    path, kept = tmp_path / "0123abcd" / "x.safetensors", tmp_path / "kept"
    path.parent.mkdir()
    huge = struct.pack("<Q", 2**62) + b"{" * 100
    deep = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    cases: tuple[tuple[bytes, dict[str, object]], ...] = (
        (pickle.dumps(_Evil()), {"given": "pickle"}),
        (huge, {"where": "header", "given": 2**62}),
        (struct.pack("<Q", len(deep)) + deep, {}),
        (b"", {"given": "short"}),
        (png(), {"missing": ("sd-ti-embedding",)}),
        (b"<html>", {"given": "short"}),
    )
    for data, wrong in cases:
        path.write_bytes(data)
        with raises(LoadError, file="x.safetensors", **wrong) as caught:
            store_adapter(path, kept, "x.safetensors")
        assert str(path) not in str(caught.value)
        assert "x.safetensors" in str(caught.value)
    drawn(0).save(path, "PNG")
    with raises(VeneerError, file="x.safetensors"):
        store_adapter(path, kept, "x.safetensors")
    save_file({"model.weight": torch.zeros(3, 3)}, path)
    with raises(VeneerError, file="x.safetensors", where="format", given=("model.weight",)):
        store_adapter(path, kept, "x.safetensors")
    assert not kept.exists()
    assert not Path("/tmp/veneer-was-here").exists()
