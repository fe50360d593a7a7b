"""Packaged photos: reading of catalogs and resource files, and a word and license terms for every image."""

import io
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from veneer.base_models.pretraining.data import icon_sets, photo_packages, photo_words

OPEN = re.compile(r"public-domain|CC0-1\.0|CC-BY-[1-4]\.0")


def png(alpha: int) -> bytes:
    pixels: icon_sets.Pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[:4, :, 3] = alpha
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_furniture_catalog(tmp_path: Path) -> None:
    names = {1: "Coffee table", 2: "Puff", 3: "Mannequin male", 4: "Oak chair"}
    lines = [f"name#{k}={name}\nicon#{k}=/set/{k}.png\nmodel#{k}=/set/{k}.obj" for k, name in names.items()]
    folder = tmp_path / "sweethome3d-furniture/usr/share/sweethome3d/furniture"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "Scopia.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "id=Scopia\n" + "\n".join(lines) + "\n")
        for k in names:
            archive.writestr(f"set/{k}.png", png(alpha=255 if k == 4 else 0))
        assert [entry["model"] for entry in photo_packages.catalog(archive)] == ["set/1.obj", "set/2.obj", "set/4.obj"]
    photos = list(photo_packages.furniture(tmp_path, "Scopia"))
    assert [photo.word for photo in photos] == ["table", "beanbag"]  # no people, and no image without transparent ground
    assert all(photo.image.mode == "RGBA" and photo.kind == "thing" for photo in photos)


def resources(files: dict[str, bytes], flag: int) -> bytes:
    """A resource file of version 2: a root with a folder "a" that contains the files."""
    names, offsets = b"", []
    for name in ("a", *files):
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, nodes = b"", [struct.pack(">IHII", 0, 2, 1, 1), struct.pack(">IHII", offsets[0], 2, len(files), 2)]
    for offset, body in zip(offsets[1:], files.values(), strict=True):
        stored = struct.pack(">I", len(body)) + zlib.compress(body) if flag == 1 else body
        nodes.append(struct.pack(">IHHHI", offset, flag, 0, 0, len(data)))
        data += struct.pack(">I", len(stored)) + stored
    tree = b"".join(node + bytes(8) for node in nodes)
    return b"qres" + struct.pack(">4I", 2, 20, 20 + len(tree) + len(names), 20 + len(tree)) + tree + names + data


@pytest.mark.parametrize("flag", [0, 1])
def test_read_qt_resources(tmp_path: Path, flag: int) -> None:
    file = tmp_path / "x.rcc"
    file.write_bytes(resources({"one.png": b"first", "two.webp": b"second" * 50}, flag))
    assert photo_packages.read_resources(file) == {"/a/one.png": b"first", "/a/two.webp": b"second" * 50}


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(40), resources({"one.png": b"first"}, 4)])
def test_read_qt_resources_errors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.rcc"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        photo_packages.read_resources(file)


def test_large_photos_are_downscaled(tmp_path: Path) -> None:
    for size, expected in (((2000, 1600), (640, 512)), ((300, 200), (300, 200))):
        Image.new("RGB", size, (9, 99, 199)).save(tmp_path / "photo.png")
        photo = photo_packages._photo(tmp_path / "photo.png", ("lake", "scene"), "budgie-backgrounds")
        assert photo.image.size == expected
        assert photo.image.getpixel((5, 5)) == (9, 99, 199)


def test_packages_have_words_and_terms() -> None:
    words = {*photo_words.WORDS.values(), *(entry[0] for entry in photo_words.GCOMPRIS.values())}
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert all(OPEN.fullmatch(terms) and author for _, _, terms, author in photo_words.GCOMPRIS.values())
    assert {*photo_packages.DEBIAN, *photo_packages.PACKAGES} < set(photo_packages.PHOTO_TERMS)
    assert not any(re.search(r"\b(SA|NC|ND|GPL)\b", terms) for terms in photo_packages.PHOTO_TERMS.values())
    assert set(photo_packages.PACKAGES) <= set(icon_sets.PACKAGES)
