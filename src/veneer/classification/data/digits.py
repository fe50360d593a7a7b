"""scikit-learn's handwritten digits: 1,797 gray images of 8 x 8 pixels in ten classes."""

import io
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from veneer.training.data.image_io import DataError

from .labeled_images import Example, LabeledRow, Source, assemble


def digits() -> Source:
    """The digits as gray PNG files in memory. `mirror` is False, because a mirrored digit is no digit.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (the test part).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "digits: scikit-learn, which contains these images, is not installed. pip install scikit-learn"
        raise DataError(message, where="digits", expected="scikit-learn") from error
    table = load_digits()
    rows = [LabeledRow(f"digits/{number:04d}", str(label), None) for number, label in enumerate(table.target)]
    files = {row.name: _png(image) for row, image in zip(rows, table.images, strict=True)}
    return replace(assemble("digits", rows, partial(_content, files)), mirror=False)


def _content(files: Mapping[str, bytes], example: Example) -> bytes:
    return files[example.name]


def _png(image: np.ndarray) -> bytes:
    """PNG of scikit-learn's values 0 to 16, scaled to 8 bits."""
    file = io.BytesIO()
    Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
