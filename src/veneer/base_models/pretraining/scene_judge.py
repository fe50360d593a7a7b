"""Measurement of images from their pixels: background, place and size of the thing, and the nearest true rendering.

These metrics use neither the prompt nor a trained model, and are therefore independent of the CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .data.icon_sets import Pixels
from .data.scenes import COLORS, MARGIN, PLACES, SIDE, SIZES, corner

CONTRAST = 48
"""Least difference of a channel to the background for a pixel of the thing."""
LEAST = 4
"""Least number of pixels of the thing in each row and column of its bounding box."""


@dataclass(frozen=True)
class SceneAttributes:
    """Attributes of an image, in the words of captions; size and place of an undetected thing: None."""

    background: str
    size: str | None
    place: str | None


def measure(image: Pixels) -> SceneAttributes:
    """Measures the attributes of an image (128, 128, 3).

    The background is the color nearest to the median of the border pixels, which composed scenes keep free.
    Pixels that differ from that median belong to the thing; the longer side of its bounding box gives the size, and the box's
    center, compared with those of all places at this size, the place.
    """
    edges = (image[:MARGIN], image[-MARGIN:], image[:, :MARGIN], image[:, -MARGIN:])
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]).astype(np.float32), axis=0)
    background = min(COLORS, key=lambda name: float(np.square(ground - np.array(COLORS[name])).sum()))
    box = bounds(np.abs(image.astype(np.float32) - ground).max(-1) > CONTRAST)
    if box is None:
        return SceneAttributes(background, None, None)
    left, top, right, bottom = box
    size = min(SIZES, key=lambda name: abs(max(right - left, bottom - top) - SIZES[name]))
    middle = np.array([left + right, top + bottom]) / 2
    place = min(PLACES, key=lambda name: float(np.square(middle - np.array(corner(size, name)) - SIZES[size] / 2).sum()))
    return SceneAttributes(background, size, place)


def bounds(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the rows and columns with at least `LEAST` marked pixels."""
    columns, rows = (np.flatnonzero(mask.sum(axis) >= LEAST) for axis in (0, 1))
    if not len(columns) or not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def nearest(of: npt.NDArray[np.float32], among: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """For each row of `of` the index of the row of `among` at the least Euclidean distance."""
    squares = np.square(among).sum(1) - 2 * of @ among.T
    return np.asarray(squares.argmin(1), np.int64)


def rank_one(features: npt.NDArray[np.float32], instances: npt.NDArray[np.int64], queries: npt.NDArray[np.int64]) -> float:
    """Share of the images `queries` (row numbers) of which the most similar other image, by cosine, is of the same instance.

    Args:
        features: of unit length, (n, width).
        instances: what each image shows, (n,).
    """
    similarity = features[queries] @ features.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return float((instances[similarity.argmax(1)] == instances[queries]).mean())


def flat(images: Pixels) -> npt.NDArray[np.float32]:
    """Images as vectors with values in 0..1."""
    return np.asarray(images, np.float32).reshape(len(images), SIDE * SIDE * 3) / np.float32(255)


def share(hits: npt.NDArray[np.bool_], resamples: int = 2000) -> dict[str, object]:
    """Accuracy of hits (seeds, prompts) in percent, with a 95 % bootstrap interval over prompts.

    Images of one prompt with several seeds are correlated, so that prompts are resampled with all their seeds.
    """
    rng = np.random.default_rng(0)
    by_prompt = hits.mean(0)
    means = by_prompt[rng.integers(len(by_prompt), size=(resamples, len(by_prompt)))].mean(1)
    low, high = np.percentile(100 * means, (2.5, 97.5))
    seeds = [round(100 * float(row.mean()), 1) for row in hits]
    percent, lowest, highest = (round(float(value), 1) for value in (100 * hits.mean(), low, high))
    return {"percent": percent, "low": lowest, "high": highest, "seeds": seeds}
