"""Judge pictures from their pixels: which background, place and size they show, and which true rendering is nearest.

Nothing here knows the prompt or a trained text tower, so these figures are independent of the CLIP's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .data.icon_sets import Pixels
from .data.scenes import COLOURS, MARGIN, PLACES, SIDE, SIZES, corner

CONTRAST = 48
"""A pixel is part of the thing when one of its channels is this far from the background's."""
LEAST = 4
"""Pixels of the thing that a row or column of its bounding box has at least."""


@dataclass(frozen=True)
class Seen:
    """What a picture shows, in the words of captions; size and place are None where nothing stands out."""

    background: str
    size: str | None
    place: str | None


def look(picture: Pixels) -> Seen:
    """Measure one picture (128, 128, 3).

    The background is the colour nearest to the median of the outermost pixels, which every composed scene leaves free.
    The thing is what differs from that median; the longer side of its bounding box gives the size, and the box's middle,
    among the middles that the size allows, the place.
    """
    edges = (picture[:MARGIN], picture[-MARGIN:], picture[:, :MARGIN], picture[:, -MARGIN:])
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]).astype(np.float32), axis=0)
    background = min(COLOURS, key=lambda name: float(np.square(ground - np.array(COLOURS[name])).sum()))
    box = bounds(np.abs(picture.astype(np.float32) - ground).max(-1) > CONTRAST)
    if box is None:
        return Seen(background, None, None)
    left, top, right, bottom = box
    size = min(SIZES, key=lambda name: abs(max(right - left, bottom - top) - SIZES[name]))
    middle = np.array([left + right, top + bottom]) / 2
    place = min(PLACES, key=lambda name: float(np.square(middle - np.array(corner(size, name)) - SIZES[size] / 2).sum()))
    return Seen(background, size, place)


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


def flat(pictures: Pixels) -> npt.NDArray[np.float32]:
    """Pictures as rows of numbers in 0..1."""
    return np.asarray(pictures, np.float32).reshape(len(pictures), SIDE * SIDE * 3) / np.float32(255)


def share(hits: npt.NDArray[np.bool_], resamples: int = 2000) -> dict[str, object]:
    """The share of hits (seeds, prompts) in percent, with a 95 % interval from resampling the prompts.

    Pictures of one prompt under several seeds are alike, so whole prompts are resampled, with all their seeds.
    """
    rng = np.random.default_rng(0)
    by_prompt = hits.mean(0)
    means = by_prompt[rng.integers(len(by_prompt), size=(resamples, len(by_prompt)))].mean(1)
    low, high = np.percentile(100 * means, (2.5, 97.5))
    seeds = [round(100 * float(row.mean()), 1) for row in hits]
    percent, lowest, highest = (round(float(value), 1) for value in (100 * hits.mean(), low, high))
    return {"percent": percent, "low": lowest, "high": highest, "seeds": seeds}
