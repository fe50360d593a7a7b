"""Handwritten digits: 1,797 grey pictures of 8 x 8 pixels in ten classes, carried by scikit-learn, so always at hand."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from veneer.training.data.image_io import DataError

from .labeled_images import Example, Row, Source, assemble


def digits() -> Source:
    """The digits as a source of grey PNG files in memory; a view enlarges them. A mirrored digit is none, so `mirror` is False.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (the test part).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "digits: scikit-learn is not installed and carries these pictures. pip install scikit-learn"
        raise DataError(message, where="digits", expected="scikit-learn") from error
    table = load_digits()
    rows = [Row(f"digits/{place:04d}", str(label), None) for place, label in enumerate(table.target)]
    files = {row.name: _png(image) for row, image in zip(rows, table.images, strict=True)}

    def content(example: Example) -> bytes:
        return files[example.name]

    return replace(assemble("digits", rows, content), mirror=False)


def _png(image: np.ndarray) -> bytes:
    """8 bits for scikit-learn's values 0 to 16."""
    file = io.BytesIO()
    Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
