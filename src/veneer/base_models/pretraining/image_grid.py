"""Image grid of 64 and more prompts, and plots of the training curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .data.captions import article
from .data.concepts import DRAWN, STYLES
from .data.icon_sets import Pixels
from .data.photo_dataset import CLOTHES, SUBJECTS
from .data.scenes import SIDE, Scene, sample_scenes
from .data.training_data import World
from .packaging import split_key

COLUMNS, LINE = 8, 26


def sheet_scenes(world: World) -> list[Scene]:
    """64 scenes of different things: every second one large in the center, the others at random places."""
    rng = np.random.default_rng(33)
    words = rng.permutation(list(DRAWN))[: COLUMNS**2].tolist()
    styles = list(STYLES.values())
    icons = [world.icons.where({word}, {styles[i % len(styles)]})[0] for i, word in enumerate(words)]
    scenes = sample_scenes(rng, [0], len(words))
    free = [Scene(icon, s.size, s.place, s.background) for icon, s in zip(icons, scenes, strict=True)]
    return [s if i % 2 else Scene(s.icon, "large", "center", s.background) for i, s in enumerate(free)]


def labels(world: World, scenes: Sequence[Scene]) -> list[str]:
    """A label of two lines for each scene."""
    return [f"{scene.size} {world.icons.words[scene.icon]}\n{scene.place}, {scene.background}" for scene in scenes]


def photo_prompts() -> list[str]:
    """A prompt for each word that photos were captioned with."""
    return [f"a photo of {article(word)}" for word in dict.fromkeys([*CLOTHES.values(), *SUBJECTS.values()])]


def draw(images: Pixels, labels: Sequence[str]) -> Image.Image:
    """An image grid with a label below each image."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 4), rows * (SIDE + LINE)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = i % COLUMNS * (SIDE + 4) + 2, i // COLUMNS * (SIDE + LINE)
        sheet.paste(Image.fromarray(image), (left, top))
        pen.text((left, top + SIDE), label, fill="black", font_size=10, spacing=0)
    return sheet


def curves(work: Path, file: Path) -> None:
    """Plots the training logs under `work`: losses, and the UNet's v-errors at the validation timesteps.

    Stages without a log, because they were initialized from packaged weights, are omitted.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in ("vae/decoder", "clip", "unet") if (work / stage / "log.jsonl").is_file()]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), layout="constrained", squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        lines = [json.loads(line) for line in (work / stage / "log.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        errors = {key: found for key in lines[-1] if (found := split_key(key))}
        for key in errors or ["loss"]:
            watched, time = errors.get(key, ("", None))
            label = key if time is None else f"{watched} v-error, t = {time}".strip()
            axis.plot(steps, [line.get(key, np.nan) for line in lines], "--" if watched else "-", label=label)
        axis.set(title=stage, xlabel="step", yscale="log" if stage != "unet" else "linear")
        axis.legend()
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
