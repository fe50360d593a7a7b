"""Openly licensed icon sets: download by package name, and rendering to RGBA arrays."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import backgrounds, concepts, photo_packages

PACKAGES = (
    "@iconify-json/noto", "@iconify-json/noto-v1", "@iconify-json/fxemoji", "@iconify-json/fluent-emoji-flat",
    "@iconify-json/fluent-emoji", "@iconify-json/twemoji", "@iconify-json/emojione", "@iconify-json/streamline-emojis",
    "@lobehub/fluent-emoji-3d", "unicode-emoji-json", "emojilib", *backgrounds.PACKAGES,
    *(name for name in photo_packages.PACKAGES if name not in backgrounds.PACKAGES),
)  # fmt: skip
RASTER = {"fluent-emoji-3d": "@lobehub/fluent-emoji-3d"}
"""Sets of image files, named by code points, instead of vector graphics."""
PIXELS = 128

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Icons:
    """Rendered icons: `rgba[i]` (128, 128, 4) is the concept `words[i]` in the icon set `sets[i]`."""

    rgba: Pixels
    words: list[str]
    sets: list[str]

    def where(self, words: set[str] | None = None, sets: set[str] | None = None) -> list[int]:
        """Indices of the icons with these words and sets (None: any)."""
        pairs = enumerate(zip(self.words, self.sets, strict=True))
        return [i for i, (w, s) in pairs if (words is None or w in words) and (sets is None or s in sets)]


def fetch(work: Path) -> Path:
    """Installs the icon packages under `work` (data only, without scripts) and returns their node_modules folder."""
    work.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES if not (work / "node_modules" / package).is_dir()]
    if missing:
        subprocess.run(["npm", "i", "--ignore-scripts", "--no-audit", "--no-fund", *missing], cwd=work, check=True)
    return work / "node_modules"


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _catalogue(modules: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The icons of every set by slug, and the emoji name of each caption word."""
    emoji = json.loads((modules / "unicode-emoji-json" / "data-by-emoji.json").read_text())
    old = (*concepts.CLIP_SETS, concepts.UNSEEN_SET)
    sets = {name: _drawings(modules, name) for name in (*old, *concepts.MORE_SETS) if name not in RASTER}
    sets |= {name: _pictures(modules / package, emoji) for name, package in RASTER.items()}
    by_group: dict[str, list[str]] = defaultdict(list)
    sets_with: dict[str, set[str]] = {}
    for record in emoji.values():
        by_group[record["group"]].append(record["name"])
        sets_with[record["name"]] = {s for s in old if _plain(record["name"]) in sets[s]}
    return sets, concepts.clip_names(by_group, sets_with)


def _drawings(modules: Path, name: str) -> dict[str, Any]:
    """The icons of an iconify set; of numbered variants ("duck-1", "duck-2") the first."""
    pack = json.loads((modules / "@iconify-json" / name / "icons.json").read_text())
    size = {"width": pack.get("width", 16), "height": pack.get("height", 16)}
    numbered = {_plain(re.sub(r"-1$", "", slug)): {**size, **icon} for slug, icon in pack["icons"].items()}
    return numbered | {_plain(slug): {**size, **icon} for slug, icon in pack["icons"].items()}


def _pictures(package: Path, emoji: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The image files of a package, which are named by the code points of the emoji."""
    found: dict[str, Any] = {}
    for text, record in emoji.items():
        points = "-".join(f"{ord(character):04x}" for character in text)
        files = [package / "assets" / f"{name}.webp" for name in (points, points.replace("-fe0f", ""))]
        found |= {_plain(record["name"]): {"file": file} for file in files if file.is_file()}
    return found


def _draw(icon: dict[str, Any], pixels: int) -> Pixels:
    """Renders an icon, cropped to its visible part and centered in a square."""
    image = Image.open(icon["file"]).convert("RGBA") if "file" in icon else _rasterized(icon, 2 * pixels)
    bounds = image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    image = image.crop(bounds) if bounds else image
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((pixels, pixels), Image.Resampling.LANCZOS))


def _rasterized(icon: dict[str, Any], pixels: int) -> Image.Image:
    import resvg_py

    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon['width']} {icon['height']}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{icon["width"]}" height="{icon["height"]}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def render(modules: Path, cache: Path, pixels: int = PIXELS) -> Icons:
    """Renders every concept in every set that has it; cached in `cache` (an .npz)."""
    if cache.is_file():
        saved = np.load(cache)
        return Icons(saved["rgba"], [str(w) for w in saved["words"]], [str(s) for s in saved["sets"]])
    sets, names = _catalogue(modules)
    rows = [(w, s, sets[s][_plain(n)]) for w, n in names.items() for s in sets if _plain(n) in sets[s]]
    rgba = np.stack([_draw(icon, pixels) for _, _, icon in rows])
    icons = Icons(rgba, [w for w, _, _ in rows], [s for _, s, _ in rows])
    np.savez(cache, rgba=rgba, words=np.array(icons.words), sets=np.array(icons.sets))
    return icons
