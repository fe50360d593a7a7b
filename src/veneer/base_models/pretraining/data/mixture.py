"""Training data mixture of the generator: scenes of icons, photos, scenes of cutouts and rendered models, and instances.

Each instance has its own token in the captions of several images, like the concept of a personalization. These
tokens are dropped when the weights are packaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import captions, photo_dataset, rendered_models
from .concepts import KEPT_BACK, UNSEEN_SET
from .icon_sets import Pixels
from .scenes import COLORS, SIDE, Compositor, Scene, sample_scenes, surround
from .training_data import World

SHARES: Mapping[str, float] = {
    "drawn": 0.36, "others": 0.08, "shots": 0.20, "cutouts": 0.16, "tinted": 0.08, "models": 0.08, "packaged": 0.04,
}  # fmt: skip
"""Fraction of a batch for each kind of example."""
SURROUNDED = 0.3
"""Fraction of the scenes on a photo (surroundings) instead of a flat color."""
SINGLE = 500
"""Number of tinted icons, and of cutouts, with an instance token."""
VIEWS = rendered_models.VIEWS
"""Scenes of each instance; also the number of views of a rendered model."""
CROPS = 8
"""Crops of each packaged photo."""


@dataclass(frozen=True)
class Shot:
    """A random square crop of a real photo, determined by `seed`.

    Args:
        photo: index in `World.photographs`, or in `World.packaged`.
        packaged: whether the photo is in `World.packaged`.
    """

    photo: int
    seed: int
    packaged: bool = False


@dataclass(frozen=True)
class Example:
    """An image and the parts of its caption.

    Args:
        token: of the instance; empty without one.
        color: color word of the thing; empty if unknown.
    """

    image: Scene | Shot
    word: str
    style: str
    token: str = ""
    color: str = ""

    def caption(self, rng: np.random.Generator) -> str:
        """Samples a caption: the word, the token or both, and some of the other attributes."""
        word = f"{self.color} {self.word}" if self.color and rng.random() < 0.25 else self.word
        if self.token:
            chance = rng.random()
            word = self.token if chance < 0.6 else f"{self.token} {word}" if chance < 0.8 else word
        if isinstance(self.image, Scene):
            return captions.caption(rng, word, self.image, self.style)
        return captions.photo_caption(rng, word)


class Mixture:
    """The training examples of all kinds, and sampling of batches."""

    def __init__(self, world: World, counts: Mapping[str, int], seed: int = 21) -> None:
        self._world = world
        self._rng = np.random.default_rng(seed)
        self.tokens: list[str] = []
        kinds = {
            "drawn": self._icons(world.drawn, counts["drawn"]),
            "others": self._icons(world.others, counts["others"]),
            "shots": self._shots(counts["shots"]),
            "cutouts": self._cutouts(counts["cutouts"]),
            "tinted": self._tinted_scenes(),
            "models": self._models(),
            "packaged": self._packaged(),
        }
        self.examples = [example for kind in kinds.values() for example in kind]
        ends = np.cumsum([len(kind) for kind in kinds.values()])
        self._rows = {name: np.arange(end - len(kinds[name]), end) for name, end in zip(kinds, ends, strict=True)}
        shares = {name: share for name, share in SHARES.items() if kinds[name]}
        self._shares = {name: share / sum(shares.values()) for name, share in shares.items()}
        usual = [i for i in self._rows["drawn"] if self._place(i) == ("large", "center")]
        self._rows["drawn, usual"] = np.array(usual)

    def draw(self, rng: np.random.Generator, batch: int, usual: float) -> npt.NDArray[np.int64]:
        """Rows of a batch by `SHARES`; a fraction `usual` of the icons of `DRAWN` is large and centered.

        Without photos the other kinds share the batch in the same proportions.
        """
        drawn = rng.choice(list(self._shares), batch, p=list(self._shares.values()))
        kinds = ["drawn, usual" if kind == "drawn" and rng.random() < usual else kind for kind in drawn]
        return np.array([rng.choice(self._rows[kind]) for kind in kinds])

    def rows(self, first: int, last: int) -> Pixels:
        """Images (n, 128, 128, 3) of the examples `first` up to `last`, which is left out."""
        return np.stack([self._image(example.image) for example in self.examples[first:last]])

    def _image(self, image: Scene | Shot) -> Pixels:
        if isinstance(image, Scene):
            return self._compositor([image])[0]
        photos = self._world.packaged if image.packaged else self._world.photographs
        pixels = photos[image.photo].pixels
        return photo_dataset.crop(np.random.default_rng((31, image.seed)), pixels, SIDE)

    @cached_property
    def _compositor(self) -> Compositor:
        views = self._world.models.rgba
        rgba = np.concatenate(
            [self._world.icons.rgba, self._world.cutouts[0], self._tinted[0], views.reshape(-1, *views.shape[2:])]
        )
        return Compositor(rgba, self._world.surroundings)

    def _place(self, row: int) -> tuple[str, str]:
        image = self.examples[row].image
        return (image.size, image.place) if isinstance(image, Scene) else ("", "")

    def _token(self) -> str:
        self.tokens.append(f"<one{len(self.tokens)}>")
        return self.tokens[-1]

    def _scenes(self, icons: list[int], count: int) -> list[Scene]:
        return surround(self._rng, sample_scenes(self._rng, icons, count), SURROUNDED)

    def _icons(self, icons: list[int], count: int) -> list[Example]:
        words = self._world.icons.words
        return [Example(scene, words[scene.icon], self._world.style(scene.icon)) for scene in self._scenes(icons, count)]

    @cached_property
    def _tinted(self) -> tuple[Pixels, list[int]]:
        """Icons of any set with changed hues, and their indices."""
        icons = self._world.icons
        rows = [i for i, (w, s) in enumerate(zip(icons.words, icons.sets, strict=True)) if w not in KEPT_BACK and s != UNSEEN_SET]
        rng = np.random.default_rng(37)
        chosen = rng.permutation(rows)[:SINGLE].tolist()
        return np.stack([tinted(rng, icons.rgba[row]) for row in chosen]), chosen

    def _tinted_scenes(self) -> list[Example]:
        first = len(self._world.icons.rgba) + len(self._world.cutouts[0])
        found: list[Example] = []
        for i, row in enumerate(self._tinted[1]):
            token, word = self._token(), self._world.icons.words[row]
            found += [Example(scene, word, "", token) for scene in self._scenes([first + i], VIEWS)]
        return found

    def _shots(self, count: int) -> list[Example]:
        photos = self._world.photographs
        if not photos:
            return []
        tokens = self._photo_tokens
        rows = [int(i) for i in self._rng.integers(len(photos), size=count)]
        rows += [i for i, photo in enumerate(photos) if photo.instance in tokens for _ in range(VIEWS)]
        seeds = self._rng.integers(2**31, size=len(rows))
        found = zip(rows, seeds, strict=True)
        return [Example(Shot(i, int(seed)), photos[i].word, "photo", tokens.get(photos[i].instance, "")) for i, seed in found]

    def _cutouts(self, count: int) -> list[Example]:
        rgba, which = self._world.cutouts
        if not which:
            return []
        photos, tokens, first = self._world.photographs, self._photo_tokens, len(self._world.icons.rgba)
        colors = [color(each) for each in rgba]
        scenes = self._scenes(list(range(first, first + len(rgba))), count)
        for i, photo in enumerate(which):
            if photos[photo].instance in tokens:
                scenes += self._scenes([first + i], VIEWS)
        numbers = [scene.icon - first for scene in scenes]
        shown = [photos[which[i]] for i in numbers]
        return [
            Example(scene, photo.word, "photo", tokens.get(photo.instance, ""), colors[i])
            for scene, photo, i in zip(scenes, shown, numbers, strict=True)
        ]

    def _models(self) -> list[Example]:
        """One scene for each view of each rendered model."""
        models = self._world.models
        first = len(self._world.icons.rgba) + len(self._world.cutouts[0]) + len(self._tinted[0])
        found: list[Example] = []
        for i, word in enumerate(models.words):
            token, views = self._token(), range(first + i * VIEWS, first + (i + 1) * VIEWS)
            found += [Example(scene, word, "3d", token) for view in views for scene in self._scenes([view], 1)]
        return found

    def _packaged(self) -> list[Example]:
        """Crops of packaged photos."""
        photos = [(i, photo.word) for i, photo in enumerate(self._world.packaged) for _ in range(CROPS)]
        seeds = self._rng.integers(2**31, size=len(photos))
        return [Example(Shot(i, int(seed), packaged=True), word, "photo") for (i, word), seed in zip(photos, seeds, strict=True)]

    @cached_property
    def _photo_tokens(self) -> dict[int, str]:
        """Tokens by instance: of all subjects, and of some clothes with a cutout."""
        photos, which = self._world.photographs, self._world.cutouts[1]
        several = sorted({photo.instance for photo in photos if photo.subject})
        clothes = [photos[i].instance for i in which if not photos[i].subject]
        chosen = [*several, *self._rng.permutation(clothes)[:SINGLE]]
        return {int(instance): self._token() for instance in chosen}


def tinted(rng: np.random.Generator, rgba: Pixels) -> Pixels:
    """The icon with a random hue shift and brightness."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).copy()
    hsv[..., 0] += np.uint8(rng.integers(256))
    hsv[..., 2] = (hsv[..., 2] * rng.uniform(0.6, 1)).astype(np.uint8)
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], -1)


def color(rgba: Pixels) -> str:
    """Color word of a thing: the nearest of `COLORS` to its median color."""
    median = np.median(rgba[rgba[..., 3] > 128][:, :3].astype(np.float32), axis=0)
    return min(COLORS, key=lambda name: float(np.square(median - np.array(COLORS[name])).sum()))
