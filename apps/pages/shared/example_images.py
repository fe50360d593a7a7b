"""Images that the package carries, for pages on which nothing has happened yet."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from html import escape

from PIL import Image, ImageOps

from veneer import base_models

SIDE, GAP = 104, 8
"""Side of an image, and between two, in pixels."""


@functools.cache
def photos() -> str:
    """The five example photos of the bundled model, as HTML."""
    images = []
    for path in sorted(base_models.examples().glob("*.png")):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return strip(images, "The example photos: five photos of a toy octopus", "A few photos like these are enough.")


@functools.cache
def digits() -> str:
    """Ten of the built-in handwritten digits, as HTML."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = [Image.fromarray((found.images[list(found.target).index(n)] * 15).astype("uint8")) for n in range(10)]
    return strip(images, "Handwritten digits from 0 to 9", "Built in: 1,797 handwritten digits in ten classes.")


def strip(images: Sequence[Image.Image], described: str, caption: str) -> str:
    """Images side by side in one figure, five in a row, which needs no request. `described`: for screen readers."""
    columns = min(5, len(images))
    step = SIDE + GAP
    sheet = Image.new("RGBA", (columns * step - GAP, -(-len(images) // columns) * step - GAP))
    for i, image in enumerate(images):
        sheet.paste(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), (i % columns * step, i // columns * step))
    data = io.BytesIO()
    sheet.save(data, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return (
        f'<figure class="strip"><img src="{source}" alt="{escape(described)}" width="{sheet.width}" height="{sheet.height}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
