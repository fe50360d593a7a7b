"""Cutouts: segmentation of the thing in a photo, to compose it on any background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .icon_sets import PIXELS, Pixels
from .photo_dataset import Photograph

BORDER = 0.03
"""Width of the border that counts as background, as a fraction of the shorter side."""
LEAST, MOST = 0.06, 0.7
"""Least and largest fraction of the photo that a thing may cover."""
WHOLE = 0.85
"""Least fraction of the foreground in its largest connected component."""


def mask(pixels: Pixels) -> npt.NDArray[np.uint8] | None:
    """Mask of the thing (height, width), 0 or 1, by GrabCut with the border as background; None if it is unreliable.

    Source: Rother et al., "GrabCut: interactive foreground extraction using iterated graph cuts" (2004).
    """
    import cv2

    height, width = pixels.shape[:2]
    labels = np.full((height, width), cv2.GC_BGD, np.uint8)
    edge = max(2, round(BORDER * min(height, width)))
    labels[edge:-edge, edge:-edge] = cv2.GC_PR_FGD
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    cv2.setRNGSeed(0)
    no_rectangle: Any = None  # not allowed by the library's stubs
    cv2.grabCut(bgr, labels, no_rectangle, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK)
    found = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
    count, parts, areas, _ = cv2.connectedComponentsWithStats(found)
    if count < 2:
        return None
    largest = 1 + int(areas[1:, cv2.CC_STAT_AREA].argmax())
    if areas[largest, cv2.CC_STAT_AREA] < WHOLE * found.sum():
        return None
    thing = cv2.morphologyEx((parts == largest).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return np.asarray(thing, np.uint8) if LEAST < thing.mean() < MOST else None


def icon(pixels: Pixels, thing: npt.NDArray[np.uint8], side: int = PIXELS) -> Pixels:
    """The cutout as RGBA (side, side, 4), centered in a square like rendered icons."""
    rows, columns = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray(255 * thing))
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    square = Image.new("RGBA", (max(image.size),) * 2)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return np.asarray(square.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA"))


def load(photos: Sequence[Photograph], which: Sequence[int], cache: Path) -> tuple[Pixels, list[int]]:
    """Cutouts (n, 128, 128, 4) of the photos `which`, and the index of the photo of each; cached in `cache` (an .npz)."""
    if not cache.is_file():
        masks = {i: mask(photos[i].pixels) for i in which}
        found = {i: icon(photos[i].pixels, thing) for i, thing in masks.items() if thing is not None}
        rgba = np.stack(list(found.values())) if found else np.zeros((0, PIXELS, PIXELS, 4), np.uint8)
        np.savez(cache, rgba=rgba, photo=np.array(list(found), np.int64))
    saved = np.load(cache)
    return saved["rgba"], [int(i) for i in saved["photo"]]
