"""Training data of a few synthetic icons and photos, without downloads."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image

from veneer.base_models.pretraining.data.backgrounds import WORDS
from veneer.base_models.pretraining.data.icon_sets import Icons, Pixels
from veneer.base_models.pretraining.data.photo_dataset import Photograph
from veneer.base_models.pretraining.data.rendered_models import VIEWS, ModelViews
from veneer.base_models.pretraining.data.scenes import COLORS
from veneer.base_models.pretraining.data.training_data import World

ROWS = [
    ("apple", "twemoji"), ("apple", "fluent-emoji-flat"), ("car", "twemoji"), ("anvil", "twemoji"), ("octopus", "twemoji"),
    ("apple", "noto"), ("apple", "fxemoji"),
]  # fmt: skip
"""Words and sets of the icons: two concepts of the generator, another, one held out, and two sets not used by the generator."""


def disk(rgb: tuple[int, int, int]) -> Pixels:
    """An icon."""
    icon = np.zeros((128, 128, 4), np.uint8)
    icon[np.hypot(*np.mgrid[-63.5:64, -63.5:64]) < 64] = (*rgb, 255)
    return icon


class SmallWorld(World):
    """Icons are disks; the photos are two shirts, two of a dog and two of a toy; all but the first shirt have a cutout.

    Of the two rendered models each view has another brightness. A photo of a lake comes in a package.
    """

    @cached_property
    def icons(self) -> Icons:
        colors = list(COLORS.values())
        return Icons(np.stack([disk(colors[i]) for i in range(len(ROWS))]), [w for w, _ in ROWS], [s for _, s in ROWS])

    @cached_property
    def surroundings(self) -> dict[str, Image.Image]:
        return {word: Image.new("RGB", (200, 160), (i, i, i)) for i, word in enumerate(WORDS)}

    @cached_property
    def photographs(self) -> list[Photograph]:
        shown = [("shirt", 0, False), ("shirt", 1, False), ("dog", 2, True), ("dog", 2, True), ("toy", 3, True), ("toy", 3, True)]
        rng = np.random.default_rng(0)
        return [Photograph(rng.integers(0, 256, (140, 150, 3)).astype(np.uint8), *each) for each in shown]

    @cached_property
    def cutouts(self) -> tuple[Pixels, list[int]]:
        which = [1, 2, 3, 4, 5]
        return np.stack([disk((200, 10 * i, 10)) for i in which]), which

    @cached_property
    def models(self) -> ModelViews:
        views = [[disk((60 * i, 10 * j, 200)) for j in range(VIEWS)] for i in range(2)]
        return ModelViews(np.array(views), ["chair", "chair"], ["Chair", "Armchair"])

    @cached_property
    def packaged(self) -> list[Photograph]:
        return [Photograph(np.full((150, 150, 3), 99, np.uint8), "lake", 0)]


class IconWorld(SmallWorld):
    """The same training data without photos."""

    @cached_property
    def photographs(self) -> list[Photograph]:
        return []

    @cached_property
    def cutouts(self) -> tuple[Pixels, list[int]]:
        return np.zeros((0, 128, 128, 4), np.uint8), []

    @cached_property
    def models(self) -> ModelViews:
        return World(self.folder).models

    @cached_property
    def packaged(self) -> list[Photograph]:
        return World(self.folder).packaged
