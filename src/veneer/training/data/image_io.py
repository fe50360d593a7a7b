"""Safe reading of image files: an upright RGB image, or an error that says what is wrong with the file.

The size in the header is checked before decoding, only the formats of `FORMATS` are tried, and a file is read once and closed.
Conversions with loss (only the first frame, an unusable color profile) are listed in `DecodedImage.notes`.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from veneer.injection.errors import VeneerError, VeneerWarning

from .file_signatures import file_kind

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
FIRST_FRAME = "contains several frames or pages; only the first is used"
PROFILE_UNUSED = "the color profile is unusable; colors are interpreted as sRGB"
"""Values of `DecodedImage.notes`, besides Pillow's warnings."""
_EXPECTED = "a PNG, JPEG, WEBP, BMP, TIFF or GIF image"
_RANGE = "expected 8 or 16 bits a channel. Export it as PNG."
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    OverflowError,
)


class DataError(VeneerError, ValueError):
    """Training data that cannot be used: which files, what was found, what was expected, and what to do."""


class PhotoError(DataError):
    """An image file that cannot be used.

    `given` describes the file, such as "missing", "empty", "damaged" or the name of another format, and `expected` has the
    supported formats; or `where` is the limit that the file exceeds, and `given` and `expected` are sizes.
    """


class DataWarning(VeneerWarning):
    """Training data that can be used but probably contains a mistake."""


@dataclass(frozen=True)
class PhotoLimits:
    """Limits on image files.

    Args:
        max_bytes: maximum file size, bytes.
        max_pixels: maximum of width x height. Pillow's decompression-bomb limit (89 million unless changed) also applies.
        max_side: maximum of the longer side, pixels.
        min_side: minimum of the shorter side, pixels.
        max_aspect: maximum ratio of the longer to the shorter side.
        background: RGB, 0 to 255, composited under transparent parts.
    """

    max_bytes: int = 128 * 2**20
    max_pixels: int = 80_000_000
    max_side: int = 20_000
    min_side: int = 16
    max_aspect: float = 16.0
    background: tuple[int, int, int] = (255, 255, 255)


class DecodedImage(NamedTuple):
    """A decoded image: RGB, the alpha channel (L) or None if opaque, and notes on conversions."""

    rgb: Image.Image
    alpha: Image.Image | None
    notes: tuple[str, ...]


def read_photo(path: str | Path, limits: PhotoLimits = PhotoLimits()) -> Image.Image:
    """Reads an image file as upright RGB, composited on `limits.background`; of an animation, the first frame.

    Colors are converted to sRGB by the embedded profile; 16-bit values are divided by 257.

    Warns:
        DataWarning: each of `DecodedImage.notes`, such as the use of only the first frame.

    Raises:
        PhotoError: not a readable image within the limits.
    """
    return _warn_notes(path, decode(read_bytes(path, limits), path, limits)).rgb


def read_mask(path: str | Path, limits: PhotoLimits = PhotoLimits()) -> Image.Image:
    """Reads a mask (mode L; white or opaque is trained on): the alpha channel of the file if it has one, else its luminance.

    Raises:
        PhotoError: not a readable image within the limits, or black everywhere.
    """
    return mask_of(_warn_notes(path, decode(read_bytes(path, limits), path, limits)), path)


def mask_of(decoded: DecodedImage, path: str | Path) -> Image.Image:
    """The mask of a decoded file; see `read_mask`."""
    mask = decoded.alpha or decoded.rgb.convert("L")
    if mask.getextrema()[1] == 0:
        message = f"{path}: the mask is black everywhere; expected white where the subject is. Edit it, or remove the file."
        raise PhotoError(message, file=path, given="black")
    return mask


def read_bytes(path: str | Path, limits: PhotoLimits) -> bytes:
    """Reads a regular file of at most `limits.max_bytes`; raises PhotoError otherwise."""
    path = Path(path)
    try:
        if not path.is_file():
            given = "broken link" if path.is_symlink() else "not a regular file" if path.exists() else "missing"
            raise _refusal(path, given, f"no such file ({given})", "Check the name.")
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        found = f"it cannot be opened ({error.strerror or error})"
        raise _refusal(path, "unreadable", found, "Check permissions.") from error
    if not data:
        raise _refusal(path, "empty", "the file is empty", "Copy or download it again.")
    if len(data) > limits.max_bytes:
        message = f"{path}: more than {limits.max_bytes:,} bytes. Save it smaller, or raise max_bytes."
        raise PhotoError(message, file=path, where="max_bytes", expected=limits.max_bytes)
    return data


def decode(data: bytes, path: str | Path, limits: PhotoLimits = PhotoLimits(), *, remarks: bool = True) -> DecodedImage:
    """Decodes `data`; `path` is used in messages only. Raises PhotoError as `read_photo` does; never warns.

    Args:
        remarks: turn Pillow's warnings into notes. This changes the warning filters of the process for a moment; pass False in
            threads, where the warnings remain warnings.
    """
    with _decoder_errors(data, path, limits), warnings.catch_warnings(record=True) if remarks else nullcontext() as caught:
        if remarks:
            warnings.simplefilter("always")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, path, limits)
            decoded = _upright(image, path, limits)
    notes = tuple(str(each.message) for each in caught or () if not issubclass(each.category, DeprecationWarning))
    return decoded._replace(notes=decoded.notes + notes)


def examine(data: bytes, path: str | Path, limits: PhotoLimits = PhotoLimits()) -> tuple[int, int]:
    """Width and height from the header of an image, without decoding pixels. Raises PhotoError as `decode` does."""
    with _decoder_errors(data, path, limits), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image, path, limits)
        return image.size


@contextmanager
def _decoder_errors(data: bytes, path: str | Path, limits: PhotoLimits) -> Iterator[None]:
    """Converts any decoder error to a PhotoError that describes the data."""
    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\((\d+) pixels\)", str(error))  # raised before the size is known
        found = f"{int(count[1]):,} pixels" if count else str(error)
        message = f"{path}: {found}; expected at most {limits.max_pixels:,} pixels. Save it smaller."
        given = int(count[1]) if count else None
        raise PhotoError(message, file=path, where="max_pixels", given=given, expected=limits.max_pixels) from error
    except UnidentifiedImageError as error:
        raise _refusal(path, *file_kind(data)) from error
    except _DECODER_ERRORS as error:
        raise _refusal(path, "damaged", f"damaged or cut off ({error})", "Copy, download or export it again.") from error
    except MemoryError as error:
        raise PhotoError(f"{path}: not enough memory to decode it. Save it smaller.", file=path, where="memory") from error


def _warn_notes(path: str | Path, decoded: DecodedImage) -> DecodedImage:
    for note in decoded.notes:
        warnings.warn(DataWarning(f"{path}: {note}", file=path, given=note), stacklevel=3)
    return decoded


def _refusal(path: str | Path, given: str, found: str, remedy: str) -> PhotoError:
    return PhotoError(f"{path}: {found}; expected {_EXPECTED}. {remedy}", file=path, given=given, expected=FORMATS)


def _check_size(image: Image.Image, path: str | Path, limits: PhotoLimits) -> None:
    """Checks the limits by the header, before any pixel is decoded."""
    width, height = image.size
    long, short = max(image.size), max(1, min(image.size))
    smaller = "Save it smaller, or raise max_side and max_pixels."
    for fits, where, expected, remedy in (
        (short >= limits.min_side, "min_side", f"sides of at least {limits.min_side}", "Use a larger image."),
        (long <= limits.max_side, "max_side", f"sides of at most {limits.max_side:,}", smaller),
        (width * height <= limits.max_pixels, "max_pixels", f"at most {limits.max_pixels:,} pixels in all", smaller),
        (
            long <= limits.max_aspect * short,
            "max_aspect",
            f"at most {limits.max_aspect:g} times as long as wide",
            "Crop it to the subject.",
        ),
    ):
        if not fits:
            message = f"{path}: {width:,} x {height:,} pixels; expected {expected}. {remedy}"
            raise PhotoError(message, file=path, where=where, given=image.size, expected=getattr(limits, where))


def _upright(image: Image.Image, path: str | Path, limits: PhotoLimits) -> DecodedImage:
    notes = []
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a phone's JPEG with a preview inside
        notes.append(FIRST_FRAME)
    image.load()
    profile = image.info.get("icc_profile")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        turned = _eight_bit(turned, path)
    if turned.mode == "F":
        raise PhotoError(f"{path}: floating-point values without a stated range; {_RANGE}", file=path, where="mode", given="F")
    alpha = None
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        alpha = turned.getchannel("A")
        if alpha.getextrema()[0] == 255:
            alpha = None
        elif alpha.getextrema()[1] == 0:
            message = f"{path}: fully transparent; expected visible pixels. Export it with its background."
            raise PhotoError(message, file=path, given="transparent")
    rgb, note = _srgb(turned, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, limits.background), alpha)
    return DecodedImage(rgb, alpha, (*notes, *note))


def _eight_bit(image: Image.Image, path: str | Path) -> Image.Image:
    """16-bit grayscale to 8 bits by scaling (65535 -> 255): Pillow's conversion clips values above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PhotoError(f"{path}: 32-bit values without a stated range; {_RANGE}", file=path, where="mode", given="I")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB in sRGB, converted by the embedded profile if there is one (such as CMYK or Display P3)."""
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None  # it is None only for inPlace=True
                return converted, ()
        except (ImageCms.PyCMSError, OSError, ValueError):
            return image.convert("RGB"), (PROFILE_UNUSED,)
    return image.convert("RGB"), ()
