"""Conversion of images of any mode to arrays and back."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from veneer.injection.errors import VeneerError

Array = npt.NDArray[np.float32]


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode; transparent parts are composited on white, 16-bit grayscale is scaled (65535 -> 255).

    Raises:
        VeneerError: floating-point or 32-bit values without a defined range.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            low, high = int(values.min()), int(values.max())
            message = f"an image of mode {image.mode} with values {low} to {high}; expected 0 to 65535."
            raise VeneerError(message, where="values", given=(low, high), expected=(0, 65535))
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        message = "an image of mode F without a defined range; expected 8 or 16 bits per channel. Scale it first."
        raise VeneerError(message, where="mode", given="F")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def rgb_values(image: Image.Image) -> Array:
    """(height, width, 3) in [0, 1]."""
    return np.asarray(to_rgb(image), np.float32) / np.float32(255)


def luminance(image: Image.Image) -> Array:
    """(height, width) in [0, 1]: the luminance."""
    return np.asarray(to_rgb(image).convert("L"), np.float32) / np.float32(255)


def to_image(values: npt.NDArray[np.bool_] | Array) -> Image.Image:
    """A gray RGB image from values (height, width) in [0, 1]; True is white."""
    levels = np.clip(np.asarray(values, np.float32), 0, 1) * 255
    return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")


XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
"""XYZ of the primaries of sRGB."""
WHITE = np.array([0.95047, 1.0, 1.08883])
"""XYZ of daylight D65, 2° observer."""


def lab(values: Array) -> Array:
    """CIE L*a*b* (..., 3) of sRGB in [0, 1], for daylight D65.

    Source: IEC 61966-2-1 (sRGB); CIE 15 (L*a*b*).
    """
    bent = ((values + np.float32(0.055)) / np.float32(1.055)) ** np.float32(2.4)
    linear = np.where(values > 0.04045, bent, values / np.float32(12.92))
    xyz = linear @ XYZ.T.astype(values.dtype) / WHITE.astype(values.dtype)
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), np.float32(7.787) * xyz + np.float32(16 / 116)), -1, 0)
    found: Array = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
    return found
