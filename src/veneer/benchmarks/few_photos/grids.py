"""Image grids of the few-photo benchmark: one per subject, and one to match images with subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from veneer.training.loop.seeds import generator
from veneer.training.report.image_grid import GridRow, make_grid

CELL, SHOWN = 160, 4
HEADS = ("the concept alone", "with background and place")

Images = Sequence[Image.Image]


def subject_grid(
    title: str, photos: Images, base: tuple[Images, Images], trained: Mapping[str, tuple[Images, Images]], note: str = ""
) -> Image.Image:
    """Photos, then images of the base with the class word, then those of each preset.

    Args:
        base, trained: images of the concept alone and of placed prompts; a few of each are shown, spread over the prompts.
        trained: by preset.
    """
    rows = [GridRow("photos", (tuple(photos),)), GridRow("base, with the class word", _groups(base))]
    rows += [GridRow(f"trained, {preset}", _groups(images)) for preset, images in trained.items()]
    return make_grid(rows, title=title, note=note, columns=HEADS, cell=CELL)


def matching_order(names: Sequence[str]) -> list[str]:
    """The names in a random order that depends on the names only."""
    order = torch.randperm(len(names), generator=generator("few photos", *names)).tolist()
    return [names[i] for i in order]


def matching_grid(title: str, photos: Mapping[str, Images], trained: Mapping[str, Images]) -> Image.Image:
    """Photos of subjects A, B, … beside images 1, 2, …, which are in the order of `matching_order`.

    Args:
        photos, trained: by subject; the same subjects.
    """
    rows = list[GridRow]()
    for i, (name, other) in enumerate(zip(photos, matching_order(list(photos)), strict=True)):
        groups = (_padded(photos[name]), _padded(spread(trained[other], SHOWN)))
        rows.append(GridRow(f"photos {letter(i)}  |  images {i + 1}", groups))
    return make_grid(rows, title=title, note="Which images show which subject?", columns=("photos", "images"), cell=CELL)


def matching_answers(names: Sequence[str]) -> dict[str, str]:
    """The letter of the photos for each number of the images."""
    return {str(i + 1): letter(list(names).index(name)) for i, name in enumerate(matching_order(names))}


def letter(index: int) -> str:
    """A, B, …, Z, A2, B2, …"""
    return chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "")


def spread(images: Images, count: int) -> Images:
    """`count` of the images, evenly over the sequence."""
    return [images[i * len(images) // count] for i in range(count)] if len(images) > count else images


def _groups(images: tuple[Images, Images]) -> tuple[tuple[Image.Image, ...], ...]:
    return tuple(tuple(spread(part, SHOWN)) for part in images)


def _padded(images: Images) -> tuple[Image.Image | None, ...]:
    return (*images[:SHOWN], *[None] * (SHOWN - len(images)))
