"""A folder of pictures of one subject: what is in it, what cannot be used, and what looks wrong."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .captions import mentions, read_captions
from .image_io import DataError, DataWarning, PhotoError, PhotoLimits, decode, mask_of, read_bytes

READ = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
REFUSED = frozenset(
    {".heic", ".heif", ".avif", ".svg", ".jxl", ".jp2", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"}
)


@dataclass(frozen=True)
class Photo:
    """One picture to train on.

    Args:
        path: the file.
        digest: BLAKE2b of its bytes, hex; a file that changes during a run is noticed by it.
        size: (height, width) in pixels, upright.
        caption: its own words, or None for a template.
        mask: where its mask is, or None. `mask == path` means the file's own alpha channel.
        is_prior: a class picture (prior preservation), not the subject.
    """

    path: Path
    digest: str
    size: tuple[int, int]
    caption: str | None = None
    mask: Path | None = None
    is_prior: bool = False


def find_photos(
    source: str | Path,
    *,
    limits: PhotoLimits = PhotoLimits(),  # noqa: B008 (frozen)
    is_prior: bool = False,
    skip_unreadable: bool = False,
    resolution: int | None = None,
    concept: str | None = None,
) -> list[Photo]:
    """The photos of a folder (not of its subfolders), or of one file, sorted by name. Every one is decoded once, so none fails
    later.

    Captions come from `NAME.txt` or `metadata.jsonl`, masks from `NAME.mask.png`, `masks/NAME.png` or the alpha channel. Hidden
    files and files that are no pictures are passed over.

    Args:
        skip_unreadable: leave out what cannot be read, with a warning, in place of an error.
        resolution, concept: if given, photos smaller than that and captions without that word are warned of; see `concerns`.

    Warns:
        DataWarning: each of `concerns`, and what was done to single pictures.

    Raises:
        DataError: nothing to train on, unreadable pictures (all are named at once), subfolders with pictures, broken captions.
    """
    source = Path(source)
    paths = _pictures(source)
    captions = read_captions(source if source.is_dir() else source.parent, paths)
    photos, problems = [], []
    for path in paths:
        try:
            photos.append(_photo(path, captions.get(path), is_prior, limits))
        except PhotoError as error:
            problems.append(error)
    listing = "".join(f"\n  {problem}" for problem in problems)
    if problems and skip_unreadable:
        message = f"{source}: left out {len(problems)} of {len(paths)} pictures:{listing}"
        warnings.warn(DataWarning(message, file=source, given=tuple(problems)), stacklevel=2)
    if problems and not (skip_unreadable and photos):
        message = f"{source}: {len(problems)} of {len(paths)} pictures cannot be used:{listing}"
        raise DataError(message, file=source, given=tuple(problems))
    for concern in (*_strays(source, paths), *concerns(photos, resolution, concept)):
        warnings.warn(concern, stacklevel=2)
    return photos


def concerns(photos: Sequence[Photo], resolution: int | None = None, concept: str | None = None) -> list[DataWarning]:
    """Warnings about readable photos: the same bytes twice (`where` is "copies"); a short side under `resolution` pixels
    ("size"); written captions without the concept ("captions"). `given` has the names of the files."""
    found = []
    by_digest: dict[str, list[str]] = {}
    for photo in photos:
        by_digest.setdefault(photo.digest, []).append(photo.path.name)
    for names in by_digest.values():
        if len(names) > 1:
            message = f"the same picture {len(names)} times: {', '.join(names)}. It will count as often; remove the copies."
            found.append(DataWarning(message, where="copies", given=tuple(names)))
    if resolution is not None:
        small = {p.path.name: p.size for p in photos if min(p.size) < resolution}
        if small:
            sizes = ", ".join(f"{name} ({width} x {height})" for name, (height, width) in small.items())
            message = f"smaller than the training resolution of {resolution}, so they will look blurred: {sizes}."
            found.append(DataWarning(message, where="size", given=tuple(small), expected=resolution))
    if concept:
        silent = [p.path.name for p in photos if p.caption is not None and not p.is_prior and not mentions(concept, p.caption)]
        if silent:
            message = f"captions without the concept {concept!r}, which will not be learnt from them: {', '.join(silent)}."
            found.append(DataWarning(message, where="captions", given=tuple(silent), expected=concept))
    return found


def _photo(path: Path, caption: str | None, is_prior: bool, limits: PhotoLimits) -> Photo:
    data = read_bytes(path, limits)
    picture = decode(data, path, limits)
    for note in picture.notes:
        warnings.warn(DataWarning(f"{path}: {note}", file=path, given=note), stacklevel=3)
    mask = _mask_file(path)
    if mask is not None:
        _check_mask(mask_of(decode(read_bytes(mask, limits), mask, limits), mask), mask, picture.rgb)
    elif picture.alpha is not None:
        mask = path
    width, height = picture.rgb.size
    return Photo(path, hashlib.blake2b(data, digest_size=20).hexdigest(), (height, width), caption, mask, is_prior)


def _check_mask(mask: Image.Image, path: Path, rgb: Image.Image) -> None:
    """A mask may have another size, but not another shape: off by more than a pixel, it would lie on other things."""
    if abs(mask.width * rgb.height - mask.height * rgb.width) > max(*mask.size, *rgb.size):
        found, wanted = f"{mask.width} x {mask.height}", f"{rgb.width} x {rgb.height}"
        raise PhotoError(
            f"{path}: a mask of {found} for a picture of {wanted} (upright); expected the same shape. Draw it on that picture.",
            file=path,
            where="mask",
            given=mask.size,
            expected=rgb.size,
        )


def _mask_file(path: Path) -> Path | None:
    places = (path.parent / f"{path.stem}.mask.png", path.parent / "masks" / f"{path.stem}.png")
    return next((place for place in places if place.is_file()), None)


def _pictures(source: Path) -> list[Path]:
    if not source.exists():
        raise DataError(f"{source}: no such file or folder. Check the name.", file=source, given="missing")
    if not source.is_dir():
        return [source]
    paths = [path for path in _visible(source) if _is_picture(path)]
    nested = [
        path for path in _visible(source) if path.is_dir() and path.name != "masks" and any(map(_is_picture, _visible(path)))
    ]
    if nested:
        names = ", ".join(f"{path.name}/" for path in nested)
        what = (
            f"{len(paths)} pictures, and subfolders with pictures: {names}" if paths else f"pictures only in subfolders: {names}"
        )
        message = f"{source}: {what}; expected the pictures of one subject. Give one folder, such as {nested[0]}."
        raise DataError(message, file=source, where="subfolders", given=tuple(path.name for path in (*paths, *nested)))
    if not paths:
        others = [path.name + "/" * path.is_dir() for path in _visible(source)]
        held = f"the folder has {', '.join(others[:8])}{' …' * (len(others) > 8)}" if others else "it is empty"
        endings = tuple(sorted(READ))
        message = f"{source}: no pictures; {held}. Expected files ending in {' '.join(endings)}."
        raise DataError(message, file=source, given=tuple(others), expected=endings)
    return paths


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}). Check permissions.", file=folder, given="unreadable"
        ) from error


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in READ | REFUSED and not path.name.lower().endswith(".mask.png") and not path.is_dir()


def _strays(source: Path, photos: Sequence[Path]) -> Iterator[DataWarning]:
    """Masks that belong to no picture."""
    if source.is_dir():
        stems = {photo.stem for photo in photos}
        masks = [(path, path.name[: -len(".mask.png")]) for path in _visible(source) if path.name.endswith(".mask.png")]
        inner = source / "masks"
        masks += [(path, path.stem) for path in _visible(inner) if _is_picture(path)] if inner.is_dir() else []
        lost = [str(path.relative_to(source)) for path, stem in masks if stem not in stems]
        if lost:
            message = f"{source}: masks without a picture: {', '.join(lost)}."
            yield DataWarning(message, file=source, where="masks", given=tuple(lost))
