"""A sheet of 64 prompts to look at, and the curves of the trainings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .compose import Scene, draw_scenes
from .concepts import DRAWN, STYLES
from .render import Pixels
from .world import World

COLUMNS, TILE, LINE = 8, 128, 26


def sheet_scenes(world: World) -> list[Scene]:
    """64 scenes of different things: every second one large in the center, the others anywhere."""
    rng = np.random.default_rng(33)
    words = rng.permutation(list(DRAWN))[: COLUMNS**2].tolist()
    styles = list(STYLES.values())
    icons = [world.icons.where({word}, {styles[i % len(styles)]})[0] for i, word in enumerate(words)]
    scenes = draw_scenes(rng, [0], len(words))
    free = [Scene(icon, s.size, s.place, s.background) for icon, s in zip(icons, scenes, strict=True)]
    return [s if i % 2 else Scene(s.icon, "large", "center", s.background) for i, s in enumerate(free)]


def draw(pictures: Pixels, words: Sequence[str], scenes: Sequence[Scene]) -> Image.Image:
    """The pictures, enlarged, each with its words beneath."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4), rows * (TILE + LINE)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, word, scene) in enumerate(zip(pictures, words, scenes, strict=True)):
        left, top = i % COLUMNS * (TILE + 4) + 2, i // COLUMNS * (TILE + LINE)
        sheet.paste(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
        said = f"{scene.size} {word}\n{scene.place}, {scene.background}"
        pen.text((left, top + TILE), said, fill="black", font_size=10, spacing=0)
    return sheet


def curves(work: Path, file: Path) -> None:
    """Plot the logs of the trainings under `work`: losses, and the UNet's v-errors at the watched timesteps.

    A training that was not made there, because it began from packaged weights, is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in ("vae", "vae/decoder", "clip", "unet") if (work / stage / "log.jsonl").is_file()]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), layout="constrained", squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        lines = [json.loads(line) for line in (work / stage / "log.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        errors = [key for key in lines[-1] if key.startswith("v") and key[1:].isdigit()]
        for key in errors or ["loss"]:
            axis.plot(steps, [line.get(key, np.nan) for line in lines], label=f"v-error, t = {key[1:]}" if errors else key)
        axis.set(title=stage, xlabel="step", yscale="log" if stage != "unet" else "linear")
        axis.legend()
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
