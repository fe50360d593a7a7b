"""Photos with map files: matching and reading of pairs.

Two layouts are detected; suffixes of photo and map may differ:

- `DATA/images/NAME.png` and `DATA/conditions/NAME.png`; the second folder may also be `conditioning`, `maps` or `control`;
- `DATA/NAME.png` and `DATA/NAME.map.png` or `DATA/NAME_map.png`.

Captions and masks of the photos are read as in `veneer.training.data.photo_folder`.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from veneer.training.data.image_io import DataError, DataWarning, PhotoLimits, decode, read_bytes
from veneer.training.data.photo_folder import Photo, find_photos, photo_warnings

from .maps.resize import resize_map

FOLDERS = ("conditions", "conditioning", "maps", "control")
ENDINGS = (".map", "_map")
_EXPECTED = f"images/NAME.png with {FOLDERS[0]}/NAME.png, or NAME.png with NAME.map.png beside it"


@dataclass(frozen=True)
class PhotoMapPair:
    """A photo and its map file."""

    photo: Photo
    map: Photo

    def read(self, limits: PhotoLimits = PhotoLimits()) -> tuple[Image.Image, Image.Image]:  # noqa: B008 (frozen)
        """The upright RGB photo and its map, RGB at the photo's size; see `veneer.control.maps.resize`.

        Raises:
            DataError: a file that cannot be read, or that has changed.
        """
        photo, given = (_read(each, limits) for each in (self.photo, self.map))
        return photo, resize_map(given, photo.size)


class FoundPairs(NamedTuple):
    """The pairs, sorted by the photo's name, and notes on skipped files and warnings."""

    pairs: tuple[PhotoMapPair, ...]
    notes: tuple[str, ...]


def find_pairs(
    source: str | Path,
    *,
    limits: PhotoLimits = PhotoLimits(),  # noqa: B008 (frozen)
    strict: bool = False,
) -> FoundPairs:
    """Finds the photos with maps in a folder; for layouts see the module. Every file is decoded once, to find errors early.

    Skipped with a note: unreadable files, photos without a map, maps without a photo, and pairs whose aspect ratios differ by
    more than 1 % (and by more than a pixel, in small images).

    Args:
        strict: raise an error with all of these instead of skipping them.

    Raises:
        DataError: no such folder, no layout or both, two files with the same name, no pairs, or `strict` and skipped files.
    """
    source = Path(source).expanduser()
    photos, maps, notes = _read_layout(source, limits, strict)
    ours, theirs = _by_name(source, "photos", photos), _by_name(source, "maps", maps)
    both = {name: PhotoMapPair(ours[name][0], theirs[name][0]) for name in ours if name in theirs}
    fitting = [pair for pair in both.values() if _fits(pair)]
    problems = [*_unmatched(source, ours, theirs), *(_misfit(pair) for pair in both.values() if not _fits(pair))]
    if problems and (strict or not fitting):
        listing = "".join(f"\n  {line}" for line in (*notes, *problems))
        message = f"{source}: {len(fitting)} photos with a matching map; expected {_EXPECTED}. Found:{listing}"
        raise DataError(message, file=source, where="pairs", given=(*notes, *problems), expected=len(fitting))
    clear = [pair.map.path.name for pair in fitting if pair.map.mask == pair.map.path]
    if clear:
        problems.append(
            f"{source}: maps with transparent parts, which are composited on {limits.background}: {', '.join(clear)}."
        )
    return FoundPairs(tuple(fitting), (*notes, *problems, *map(str, photo_warnings([pair.photo for pair in fitting]))))


def _read_layout(source: Path, limits: PhotoLimits, strict: bool) -> tuple[dict[Photo, str], dict[Photo, str], list[str]]:
    """Photos and maps, each with the name to match by, and the warnings of reading them."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; expected {_EXPECTED}. Check the name.", file=source, given="missing")
    beside = [source / name for name in FOLDERS if (source / name).is_dir()]
    if not (source / "images").is_dir():
        if beside:
            raise DataError(
                f"{source}: has {beside[0].name}/ but no images/; expected {_EXPECTED}. Move the photos to images/.",
                file=source,
                where="images",
                given=beside[0].name,
            )
        found, notes = _photos(source, limits, strict)
        names = {photo: _without_ending(photo.path.stem) for photo in found}
        return {p: p.path.stem for p, n in names.items() if n is None}, {p: n for p, n in names.items() if n is not None}, notes
    if len(beside) != 1:
        held = " and ".join(f"{each.name}/" for each in beside) or "no folder of maps"
        message = f"{source}: {held} beside images/; expected one of {', '.join(FOLDERS)}."
        raise DataError(message, file=source, where="maps", given=tuple(each.name for each in beside), expected=FOLDERS)
    (photos, notes), (maps, more) = (_photos(each, limits, strict) for each in (source / "images", beside[0]))
    return {p: p.path.stem for p in photos}, {p: p.path.stem for p in maps}, [*notes, *more]


def _photos(folder: Path, limits: PhotoLimits, strict: bool) -> tuple[list[Photo], list[str]]:
    """The images of a folder, and the warnings about them, except those that apply only to training photos."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find_photos(folder, limits=limits, skip_unreadable=not strict)
    for each in caught:
        if not issubclass(each.category, DataWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    notes = [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
    later = [str(each) for each in photo_warnings(found)]
    return found, [text for text in notes if text not in later]


def _without_ending(stem: str) -> str | None:
    """The photo's name in the name of a map; None for other files."""
    return next((stem.removesuffix(ending) for ending in ENDINGS if stem.endswith(ending) and stem != ending), None)


def _by_name(source: Path, what: str, names: Mapping[Photo, str]) -> dict[str, list[Photo]]:
    found: dict[str, list[Photo]] = {}
    for photo, name in names.items():
        found.setdefault(name, []).append(photo)
    twice = [[each.path.name for each in group] for group in found.values() if len(group) > 1]
    if twice:
        listing = "; ".join(" and ".join(group) for group in twice)
        message = f"{source}: {what} with the same name: {listing}; expected unique names. Rename or remove one."
        raise DataError(message, file=source, where=what, given=tuple(chain.from_iterable(twice)))
    return found


def _unmatched(source: Path, ours: Mapping[str, list[Photo]], theirs: Mapping[str, list[Photo]]) -> Iterator[str]:
    for what, some, others in (("photos without a map", ours, theirs), ("maps without a photo", theirs, ours)):
        names = _files(group[0] for name, group in some.items() if name not in others)
        if names:
            yield f"{source}: {what}: {names}; skipped."


def _files(photos: Iterable[Photo]) -> str:
    return ", ".join(photo.path.name for photo in photos)


def _fits(pair: PhotoMapPair) -> bool:
    (height, width), (tall, wide) = pair.photo.size, pair.map.size
    return abs(wide * height - width * tall) <= max(0.01 * width * tall, height, width, tall, wide)


def _misfit(pair: PhotoMapPair) -> str:
    photo, given = ("{1} x {0}".format(*each.size) for each in (pair.photo, pair.map))
    return f"{pair.map.path}: a map of {given} for a photo of {photo}; expected the same aspect ratio; skipped."


def _read(found: Photo, limits: PhotoLimits) -> Image.Image:
    data = read_bytes(found.path, limits)
    if hashlib.blake2b(data, digest_size=20).hexdigest() != found.digest:
        message = f"{found.path}: the file has changed since it was first read. Do not modify images and maps during a run."
        raise DataError(message, file=found.path, given="changed")
    return decode(data, found.path, limits, remarks=False).rgb
