"""Scenes: icons composed on backgrounds, whose captioned attributes can be measured from the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import backgrounds
from .icon_sets import Pixels

SIDE = 128
MARGIN = 4
"""Free margin of scenes at every edge, in pixels."""
SIZES: dict[str, int] = {"small": 52, "medium": 76, "large": 104}
PLACES: dict[str, tuple[int, int]] = {
    "top left": (-1, -1), "top": (0, -1), "top right": (1, -1),
    "left": (-1, 0), "center": (0, 0), "right": (1, 0),
    "bottom left": (-1, 1), "bottom": (0, 1), "bottom right": (1, 1),
}  # fmt: skip
"""Place -> its direction from the center, as (x, y), each -1, 0 or 1."""
COLORS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "black": (22, 22, 26), "gray": (150, 152, 156), "red": (214, 48, 49),
    "orange": (242, 140, 40), "yellow": (250, 216, 72), "green": (62, 164, 82), "blue": (44, 96, 208),
    "sky": (150, 206, 246), "purple": (128, 66, 170), "pink": (246, 160, 196), "brown": (124, 82, 52),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Attributes of a composed image: an icon (its row in `Icons`), size, place and background.

    The background is a color, or a photo (surroundings) with `crop` as the seed of its crop.
    """

    icon: int
    size: str
    place: str
    background: str
    crop: int = 0


def corner(size: str, place: str) -> tuple[int, int]:
    """Left and top pixel of the icon's square, inside the margin."""
    free = SIDE - 2 * MARGIN - SIZES[size]
    x, y = PLACES[place]
    return MARGIN + free * (x + 1) // 2, MARGIN + free * (y + 1) // 2


class Compositor:
    """Composes scenes from icons; resized icons are cached."""

    def __init__(self, rgba: Pixels, photos: Mapping[str, Image.Image] | None = None) -> None:
        self._rgba, self._photos = rgba, photos or {}
        self._layers: dict[tuple[int, str], npt.NDArray[np.float32]] = {}

    def __call__(self, scenes: list[Scene]) -> Pixels:
        """Images (n, 128, 128, 3) of the scenes."""
        out = np.empty((len(scenes), SIDE, SIDE, 3), np.float32)
        for image, scene in zip(out, scenes, strict=True):
            image[:] = self._background(scene)
            left, top = corner(scene.size, scene.place)
            layer = self._layer(scene.icon, scene.size)
            part = image[top : top + len(layer), left : left + len(layer)]
            part *= 1 - layer[..., 3:] / np.float32(255)
            part += layer[..., :3]
        return np.clip(out + 0.5, 0, 255).astype(np.uint8)

    def _layer(self, icon: int, size: str) -> npt.NDArray[np.float32]:
        if (icon, size) not in self._layers:
            self._layers[icon, size] = premultiplied(Image.fromarray(self._rgba[icon]), SIZES[size])
        return self._layers[icon, size]

    def _background(self, scene: Scene) -> npt.ArrayLike:
        if scene.background in COLORS:
            return COLORS[scene.background]
        return np.asarray(backgrounds.crop(self._photos[scene.background], scene.crop, SIDE))


def premultiplied(icon: Image.Image, side: int) -> npt.NDArray[np.float32]:
    """The icon at `side` pixels, (side, side, 4) in 0..255, colors multiplied by alpha."""
    pixels = np.asarray(icon.convert("RGBa").resize((side, side), Image.Resampling.BOX, reducing_gap=None))
    return pixels.astype(np.float32)


def sample_scenes(rng: np.random.Generator, icons: list[int], n: int) -> list[Scene]:
    """Samples `n` scenes of the given icons: mostly large things, half of them in the center."""
    sizes, places, colors = list(SIZES), list(PLACES), list(COLORS)
    which = rng.choice(icons, n)
    size = rng.choice(len(sizes), n, p=(0.2, 0.3, 0.5))
    place = np.where(rng.random(n) < 0.4, places.index("center"), rng.integers(len(places), size=n))
    color = np.where(rng.random(n) < 0.15, colors.index("white"), rng.integers(len(colors), size=n))
    rows = zip(which, size, place, color, strict=True)
    return [Scene(int(w), sizes[s], places[p], colors[c]) for w, s, p, c in rows]


def surround(rng: np.random.Generator, scenes: list[Scene], share: float) -> list[Scene]:
    """The scenes, a fraction of them with a photo (surroundings) instead of a color as background."""
    words = backgrounds.WORDS
    which, crops = rng.integers(len(words), size=len(scenes)), rng.integers(2**31, size=len(scenes))
    moved = rng.random(len(scenes)) < share
    rows = zip(scenes, moved, which, crops, strict=True)
    return [replace(s, background=words[w], crop=int(c)) if m else s for s, m, w, c in rows]


def augmented_images(rng: np.random.Generator, rgba: Pixels, photos: list[Image.Image], n: int) -> Pixels:
    """Samples `n` images of a photo crop, a gradient or noise, often with one or two augmented icons."""
    out = np.empty((n, SIDE, SIDE, 3), np.uint8)
    for i in range(n):
        canvas = random_canvas(rng, photos)
        for _ in range(rng.integers(0, 3)):
            icon = Image.fromarray(rgba[rng.integers(len(rgba))])
            side = int(rng.integers(36, 152))
            icon = icon.rotate(float(rng.normal(0, 25)), Image.Resampling.BILINEAR).resize((side, side))
            left, top = (int(v) for v in rng.integers(-side // 3, SIDE - side // 2, 2))
            canvas.paste(icon, (left, top), icon)
        out[i] = jitter(rng, np.asarray(canvas))
    return out


def random_canvas(rng: np.random.Generator, photos: list[Image.Image]) -> Image.Image:
    """Samples a background: a photo crop, a flat color, a gradient or noise."""
    kind = rng.integers(4)
    if kind == 0 and photos:
        return backgrounds.crop(photos[rng.integers(len(photos))], int(rng.integers(2**31)), SIDE)
    if kind == 1:
        return Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(0, 256, 3)))
    return _gradient(rng, noisy=kind == 2)


def _gradient(rng: np.random.Generator, noisy: bool) -> Image.Image:
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    canvas = np.asarray(Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(np.float32)
    if noisy:
        cells = int(rng.integers(4, SIDE))
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)).resize((SIDE, SIDE))
        canvas = canvas + (np.asarray(noise).astype(np.float32) - 128) * rng.uniform(0.05, 0.5)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def jitter(rng: np.random.Generator, image: Pixels, strength: float = 0.25, permute: float = 1 / 6) -> Pixels:
    """Random brightness, contrast, saturation and, with probability `permute`, a permutation of the color channels."""
    x = image.astype(np.float32) / 255
    gray = x.mean(-1, keepdims=True)
    x = gray + (x - gray) * (1 + rng.uniform(-2, 1) * strength)
    x = (x - 0.5) * (1 + rng.uniform(-1, 1) * strength) + 0.5 + rng.uniform(-1, 1) * strength / 2
    x = x[..., rng.permutation(3)] if rng.random() < permute else x
    return np.clip(x * 255, 0, 255).astype(np.uint8)
