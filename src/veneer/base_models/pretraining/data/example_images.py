"""The bundled example images: a concept held out from the generator, in scenes of its captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .captions import article
from .icon_sets import Icons
from .scenes import COLORS, SIDE, SIZES, Scene, corner

WORD, SET = "octopus", "twemoji"

SCENES = (
    Scene(0, "large", "center", "sky"),
    Scene(0, "large", "bottom right", "yellow"),
    Scene(0, "medium", "left", "white"),
    Scene(0, "medium", "top right", "green"),
    Scene(0, "large", "center", "orange"),
)


def compose(icon: Image.Image, scene: Scene) -> Image.Image:
    """Composes the scene with Pillow."""
    side = SIZES[scene.size]
    canvas = Image.new("RGB", (SIDE, SIDE), COLORS[scene.background])
    small = icon.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")
    canvas.paste(small, corner(scene.size, scene.place), small)
    return canvas


def describe(scene: Scene) -> str:
    """The caption with a placeholder for the concept; captioned attributes are not learned as part of the concept."""
    size = "" if scene.size == "large" else f"{scene.size} "
    return f"{article(size + '{concept}')}, {scene.place}, {scene.background} background"


def write(icons: Icons, folder: Path) -> None:
    """Writes the images and their captions (`metadata.jsonl`) to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (row,) = icons.where({WORD}, {SET})
    icon = Image.fromarray(np.asarray(icons.rgba[row]))
    lines = []
    for number, scene in enumerate(SCENES, 1):
        name = f"{number:02}.png"
        compose(icon, scene).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": describe(scene)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
