"""Image files for tests: small, with content that shows their orientation."""

from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def gradient(width: int, height: int, seed: int = 0) -> Image.Image:
    """Red grows to the right, green downwards; blue is smooth noise by the seed."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4)).astype(np.uint8)
    blue = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.stack([red, green, blue], axis=-1).round().astype(np.uint8))


def save(path: Path, width: int = 80, height: int = 64, seed: int = 0, **options: object) -> Path:
    """A gradient as a file; the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient(width, height, seed).save(path, **options)
    return path
