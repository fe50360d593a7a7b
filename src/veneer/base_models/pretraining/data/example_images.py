"""The example pictures: one thing that the generator never saw, in scenes that it knows how to describe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .captions import article
from .icon_sets import Icons
from .scenes import COLOURS, SIDE, SIZES, Scene, corner

WORD, SET = "octopus", "twemoji"

SCENES = (
    Scene(0, "large", "center", "sky"),
    Scene(0, "large", "bottom right", "yellow"),
    Scene(0, "medium", "left", "white"),
    Scene(0, "medium", "top right", "green"),
    Scene(0, "large", "center", "orange"),
)


def picture(icon: Image.Image, scene: Scene) -> Image.Image:
    """The scene, composed by Pillow."""
    side = SIZES[scene.size]
    canvas = Image.new("RGB", (SIDE, SIDE), COLOURS[scene.background])
    small = icon.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")
    canvas.paste(small, corner(scene.size, scene.place), small)
    return canvas


def describe(scene: Scene) -> str:
    """The caption, open for the concept word: what is said here is not learnt as part of the concept."""
    size = "" if scene.size == "large" else f"{scene.size} "
    return f"{article(size + '{concept}')}, {scene.place}, {scene.background} background"


def write(icons: Icons, folder: Path) -> None:
    """Write the pictures and their captions (`metadata.jsonl`) to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (row,) = icons.where({WORD}, {SET})
    icon = Image.fromarray(np.asarray(icons.rgba[row]))
    lines = []
    for number, scene in enumerate(SCENES, 1):
        name = f"{number:02}.png"
        picture(icon, scene).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": describe(scene)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
