"""Guarded reading of pictures: whatever the file holds, either an upright RGB picture or an error that says what to do.

Nothing is decoded before the size that the header claims has been checked, only the formats of `FORMATS` are tried, and a file
is read once and closed. What was done to a picture on the way (first frame taken, profile not readable) is told in
`Picture.notes`.
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
FIRST_FRAME = "holds several frames or pages; only the first is used"
PROFILE_UNUSED = "its color profile cannot be used; colors are taken as sRGB"
"""The values of `Picture.notes`, beside Pillow's own warnings."""
_EXPECTED = "a PNG, JPEG, WEBP, BMP, TIFF or GIF picture"
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
    """Training data that cannot be used as it is: which files, what was found, what is expected, what to do."""


class PhotoError(DataError):
    """One image file that cannot be used.

    `given` is what the file is, such as "missing", "empty", "damaged" or the name of another format, and `expected` the formats
    that are read; or `where` is the limit that the file exceeds, and `given` and `expected` are sizes.
    """


class DataWarning(VeneerWarning):
    """Training data that can be used, but probably not as meant."""


@dataclass(frozen=True)
class PhotoLimits:
    """What is read, and how.

    Args:
        max_bytes: largest file, in bytes.
        max_pixels: largest width x height. Pillow's own bomb limit (89 million unless changed) holds as well.
        max_side: longest side, in pixels.
        min_side: shortest side, in pixels.
        max_aspect: longest side over shortest.
        background: RGB, 0 to 255, on which transparent parts are laid.
    """

    max_bytes: int = 128 * 2**20
    max_pixels: int = 80_000_000
    max_side: int = 20_000
    min_side: int = 16
    max_aspect: float = 16.0
    background: tuple[int, int, int] = (255, 255, 255)


class Picture(NamedTuple):
    """A decoded picture: RGB, its alpha channel (L) unless opaque everywhere, and notes on what was done to it."""

    rgb: Image.Image
    alpha: Image.Image | None
    notes: tuple[str, ...]


def read_photo(path: str | Path, limits: PhotoLimits = PhotoLimits()) -> Image.Image:
    """The upright RGB picture in a file; transparent parts on `limits.background`; the first frame of an animation.

    Colours are taken to sRGB by the embedded profile, 16-bit values are divided by 257.

    Warns:
        DataWarning: something was done that the file's owner may not expect (a first frame taken).

    Raises:
        PhotoError: not a readable picture within the limits.
    """
    return _told(path, decode(read_bytes(path, limits), path, limits)).rgb


def read_mask(path: str | Path, limits: PhotoLimits = PhotoLimits()) -> Image.Image:
    """A mask (mode L; white or opaque is kept): the file's alpha channel if it has one, else its brightness.

    Raises:
        PhotoError: not a readable picture within the limits, or black everywhere, so that nothing would be learnt.
    """
    return mask_of(_told(path, decode(read_bytes(path, limits), path, limits)), path)


def mask_of(picture: Picture, path: str | Path) -> Image.Image:
    """The mask that a decoded file means; see `read_mask`."""
    mask = picture.alpha or picture.rgb.convert("L")
    if mask.getextrema()[1] == 0:
        message = f"{path}: the mask is black everywhere; expected white where the subject is. Paint it, or remove the file."
        raise PhotoError(message, file=path, given="black")
    return mask


def read_bytes(path: str | Path, limits: PhotoLimits) -> bytes:
    """The content of a regular file of at most `limits.max_bytes`, read once; PhotoError otherwise."""
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


def decode(data: bytes, path: str | Path, limits: PhotoLimits = PhotoLimits(), *, remarks: bool = True) -> Picture:
    """The picture in `data`; `path` is only the name in messages. Raises PhotoError as `read_photo` does; never warns.

    Args:
        remarks: turn Pillow's warnings into notes. That swaps the filters of the whole process for a moment: False in threads,
            where the warnings then stay warnings.
    """
    with _explained(data, path, limits), warnings.catch_warnings(record=True) if remarks else nullcontext() as caught:
        if remarks:
            warnings.simplefilter("always")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, path, limits)
            picture = _upright(image, path, limits)
    told = tuple(str(each.message) for each in caught or () if not issubclass(each.category, DeprecationWarning))
    return picture._replace(notes=picture.notes + told)


def examine(data: bytes, path: str | Path, limits: PhotoLimits = PhotoLimits()) -> tuple[int, int]:
    """Width and height by the head of a picture, of which no pixel is decoded. Raises PhotoError as `decode` does."""
    with _explained(data, path, limits), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image, path, limits)
        return image.size


@contextmanager
def _explained(data: bytes, path: str | Path, limits: PhotoLimits) -> Iterator[None]:
    """Whatever a decoder raises as a PhotoError that says what the data are."""
    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\((\d+) pixels\)", str(error))  # it is raised before the size is told
        found = f"{int(count[1]):,} pixels" if count else str(error)
        message = f"{path}: {found}; expected at most {limits.max_pixels:,} pixels. Save it smaller."
        given = int(count[1]) if count else None
        raise PhotoError(message, file=path, where="max_pixels", given=given, expected=limits.max_pixels) from error
    except UnidentifiedImageError as error:
        raise _refusal(path, *file_kind(data)) from error
    except _DECODER_ERRORS as error:
        raise _refusal(path, "damaged", f"damaged or cut off ({error})", "Copy, download or export it again.") from error
    except MemoryError as error:
        raise PhotoError(f"{path}: more pixels than memory holds. Save it smaller.", file=path, where="memory") from error


def _told(path: str | Path, picture: Picture) -> Picture:
    for note in picture.notes:
        warnings.warn(DataWarning(f"{path}: {note}", file=path, given=note), stacklevel=3)
    return picture


def _refusal(path: str | Path, given: str, found: str, remedy: str) -> PhotoError:
    return PhotoError(f"{path}: {found}; expected {_EXPECTED}. {remedy}", file=path, given=given, expected=FORMATS)


def _check_size(image: Image.Image, path: str | Path, limits: PhotoLimits) -> None:
    """Refuse by the header alone: no pixel has been decoded yet."""
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
            "Cut out the part that shows the subject.",
        ),
    ):
        if not fits:
            message = f"{path}: {width:,} x {height:,} pixels; expected {expected}. {remedy}"
            raise PhotoError(message, file=path, where=where, given=image.size, expected=getattr(limits, where))


def _upright(image: Image.Image, path: str | Path, limits: PhotoLimits) -> Picture:
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
            message = f"{path}: fully transparent; expected something to see. Export it with its background."
            raise PhotoError(message, file=path, given="transparent")
    rgb, note = _srgb(turned, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, limits.background), alpha)
    return Picture(rgb, alpha, (*notes, *note))


def _eight_bit(image: Image.Image, path: str | Path) -> Image.Image:
    """16-bit grey to 8 bits by scaling (65535 -> 255): Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PhotoError(f"{path}: 32-bit values without a stated range; {_RANGE}", file=path, where="mode", given="I")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB in sRGB, through the embedded profile where there is one (CMYK from a printer's file, Display P3 from a phone)."""
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
