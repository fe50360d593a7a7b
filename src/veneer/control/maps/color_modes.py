"""Pictures of any mode to colours and back."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from veneer.injection.errors import VeneerError

Array = npt.NDArray[np.float32]


def upright_rgb(picture: Image.Image) -> Image.Image:
    """RGB of a picture of any mode; transparent parts lie on white, 16-bit greys are scaled (65535 -> 255).

    Raises:
        VeneerError: floating-point or 32-bit values, whose range nothing states.
    """
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            low, high = int(values.min()), int(values.max())
            message = f"a picture of mode {picture.mode} with values {low} to {high}; expected 0 to 65535."
            raise VeneerError(message, where="values", given=(low, high), expected=(0, 65535))
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        message = "a picture of mode F, whose range nothing states; expected 8 or 16 bits a channel. Scale it first."
        raise VeneerError(message, where="mode", given="F")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def colours(picture: Image.Image) -> Array:
    """(height, width, 3) in [0, 1]."""
    return np.asarray(upright_rgb(picture), np.float32) / np.float32(255)


def luminance(picture: Image.Image) -> Array:
    """(height, width) in [0, 1]: the brightness of a map that is grey anyway."""
    return np.asarray(upright_rgb(picture).convert("L"), np.float32) / np.float32(255)


def drawn(values: npt.NDArray[np.bool_] | Array) -> Image.Image:
    """A grey RGB picture of values (height, width) in [0, 1]; true is white."""
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
