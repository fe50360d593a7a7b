"""Bundled images, shown on pages before the first run."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from html import escape

from PIL import Image, ImageOps

SIDE, GAP = 104, 8
"""Side of an image and gap between images, in pixels."""


@functools.cache
def digits() -> str:
    """HTML of ten built-in handwritten digits."""
    return image_strip(digit_images(), "Handwritten digits from 0 to 9", "Built in: 1,797 handwritten digits in ten classes.")


def digit_images() -> list[Image.Image]:
    """The first image of each built-in digit."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    return [Image.fromarray((dataset.images[list(dataset.target).index(n)] * 15).astype("uint8")) for n in range(10)]


def image_strip(images: Sequence[Image.Image], alt: str, caption: str) -> str:
    """Image grid of five columns as one HTML figure with an inline image. `alt`: text for screen readers."""
    columns = min(5, len(images))
    step = SIDE + GAP
    canvas = Image.new("RGBA", (columns * step - GAP, -(-len(images) // columns) * step - GAP))
    for i, image in enumerate(images):
        canvas.paste(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), (i % columns * step, i // columns * step))
    data = io.BytesIO()
    canvas.save(data, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return (
        f'<figure class="strip"><img src="{source}" alt="{escape(alt)}" width="{canvas.width}" height="{canvas.height}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
