"""Real photos with caption words: clothes, and subjects with several photos each.

They are read from an external folder: `clothing-160/SPLIT/CLASS/*` and `subjects-more/SUBJECT/*`. Only the subjects listed here
are read, and no test photos of clothes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .icon_sets import Pixels

SUBJECTS: dict[str, str] = {
    "backpack_dog": "backpack", "bear_plushie": "teddy bear", "candle": "candle", "colorful_sneaker": "shoe",
    "fancy_boot": "boot", "grey_sloth_plushie": "toy", "poop_emoji": "toy", "dog": "dog", "dog2": "dog", "dog5": "dog",
}  # fmt: skip
"""Training subjects -> caption word."""

VALIDATION: dict[str, str] = {"shiny_sneaker": "shoe", "cat2": "cat", "dog6": "dog", "berry_bowl": "bowl"}
"""Validation subjects, held out from training -> caption word."""

CLOTHES: dict[str, str] = {
    "dress": "dress", "hat": "hat", "longsleeve": "sweater", "outwear": "jacket", "pants": "pants", "shirt": "shirt",
    "shoes": "shoe", "shorts": "shorts", "skirt": "skirt", "t-shirt": "t-shirt",
}  # fmt: skip
"""Classes of the clothing photos -> caption word."""

STORED = 176
"""Short side of the photos in memory, in pixels."""


@dataclass(frozen=True)
class Photograph:
    """A photo, RGB bytes (height, width, 3), with its caption word and the number of its instance.

    A `subject` has several photos.
    """

    pixels: Pixels
    word: str
    instance: int
    subject: bool = False


def load(folder: Path) -> list[Photograph]:
    """All training photos; photos of one subject share an instance, each photo of clothes has its own."""
    found = clothes(folder, "train")
    return [*found, *subjects(folder, SUBJECTS, len(found))]


def subjects(folder: Path, words: Mapping[str, str], first: int = 0) -> list[Photograph]:
    """The photos of subjects, by name and caption word; instances are numbered from `first`."""
    return [
        Photograph(read(file), word, i, subject=True)
        for i, (name, word) in enumerate(words.items(), first)
        for file in sorted((folder / "subjects-more" / name).iterdir())
    ]


def clothes(folder: Path, split: str) -> list[Photograph]:
    """The photos of clothes of a split; only "train" is for training."""
    words = [
        (file, word) for name, word in CLOTHES.items() for file in sorted((folder / "clothing-160" / split / name).iterdir())
    ]
    return [Photograph(read(file), word, i) for i, (file, word) in enumerate(words)]


def read(file: Path) -> Pixels:
    """Reads a photo, with at most `STORED` pixels at its short side."""
    return reduce(Image.open(file).convert("RGB"))


def reduce(image: Image.Image) -> Pixels:
    """An RGB image with at most `STORED` pixels at its short side."""
    factor = STORED / min(image.size)
    if factor < 1:
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    return np.asarray(image)


def square(pixels: Pixels, side: int) -> Pixels:
    """The center square of a photo, at `side` pixels."""
    length = min(pixels.shape[:2])
    top, left = ((each - length) // 2 for each in pixels.shape[:2])
    part = Image.fromarray(pixels[top : top + length, left : left + length])
    return np.asarray(part.resize((side, side), Image.Resampling.LANCZOS))


def crop(rng: np.random.Generator, pixels: Pixels, side: int, least: float = 0.8) -> Pixels:
    """A random square crop of `least` to all of the short side, resized to `side` pixels, mirrored at random."""
    height, width = pixels.shape[:2]
    extent = int(min(height, width) * rng.uniform(least, 1))
    top, left = (int(rng.integers(0, length - extent + 1)) for length in (height, width))
    part = Image.fromarray(pixels[top : top + extent, left : left + extent]).resize((side, side), Image.Resampling.BICUBIC)
    out = np.asarray(part)
    return out[:, ::-1] if rng.random() < 0.5 else out
