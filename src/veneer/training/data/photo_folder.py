"""Photos of a folder with captions and masks, and warnings about them."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .caption_files import read_captions
from .captions import mentions
from .image_io import DataError, DataWarning, PhotoError, PhotoLimits, decode, mask_of, read_bytes

READ = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
REFUSED = frozenset(
    {".heic", ".heif", ".avif", ".svg", ".jxl", ".jp2", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"}
)


@dataclass(frozen=True)
class Photo:
    """A training image.

    Args:
        path: the file.
        digest: BLAKE2b of its bytes, hex, which detects files that change during a run.
        size: (height, width) in pixels, after EXIF rotation.
        caption: its caption, or None to use a template.
        mask: path of its mask, or None. `mask == path` means the alpha channel of the file.
        is_prior: True for a class image (prior preservation).
        concept: trigger token of its dataset, if a run has several.
    """

    path: Path
    digest: str
    size: tuple[int, int]
    caption: str | None = None
    mask: Path | None = None
    is_prior: bool = False
    concept: str = ""


def find_photos(
    source: str | Path,
    *,
    limits: PhotoLimits = PhotoLimits(),  # noqa: B008 (frozen)
    is_prior: bool = False,
    skip_unreadable: bool = False,
    resolution: int | None = None,
    concept: str | None = None,
    recursive: bool = False,
    caption_extension: str = ".txt",
) -> list[Photo]:
    """Finds the photos of a folder, or a single photo, sorted by name. Each is decoded once, so that errors appear before
    training.

    Captions come from `NAME.txt` or the metadata of the folder (see `caption_files`), masks from `NAME.mask.png`,
    `masks/NAME.png` or the alpha channel. Hidden files and other file types are ignored.

    Args:
        skip_unreadable: skip unreadable files with a warning instead of an error.
        resolution, concept: warn about photos that are smaller, and captions without the concept; see `photo_warnings`.
        recursive: also read subfolders, except `masks` and hidden ones; otherwise subfolders with images are an error.
        caption_extension: ending of caption files.

    Warns:
        DataWarning: each of `photo_warnings`, and the notes on decoded images.

    Raises:
        DataError: no photos, unreadable images (all of them are listed), subfolders with images, or invalid captions.
    """
    source = Path(source)
    paths = _image_paths(source, recursive)
    captions = read_captions(source if source.is_dir() else source.parent, paths, caption_extension)
    photos, problems = [], []
    for path in paths:
        try:
            photos.append(_photo(path, captions.get(path), is_prior, limits))
        except PhotoError as error:
            problems.append(error)
    listing = "".join(f"\n  {problem}" for problem in problems)
    if problems and skip_unreadable:
        message = f"{source}: skipped {len(problems)} of {len(paths)} images:{listing}"
        warnings.warn(DataWarning(message, file=source, given=tuple(problems)), stacklevel=2)
    if problems and not (skip_unreadable and photos):
        message = f"{source}: {len(problems)} of {len(paths)} images cannot be used:{listing}"
        raise DataError(message, file=source, given=tuple(problems))
    folders = dict.fromkeys([source, *(path.parent for path in paths)]) if source.is_dir() else ()
    unmatched = [each for folder in folders for each in _unmatched_masks(folder, [p for p in paths if p.parent == folder])]
    for concern in (*unmatched, *photo_warnings(photos, resolution, concept)):
        warnings.warn(concern, stacklevel=2)
    return photos


def photo_warnings(photos: Sequence[Photo], resolution: int | None = None, concept: str | None = None) -> list[DataWarning]:
    """Warnings about photos: duplicates (`where` is "copies"), a shorter side below `resolution` pixels ("size"), and captions
    without the concept ("captions"). `given` has the file names."""
    found = []
    by_digest: dict[str, list[str]] = {}
    for photo in photos:
        by_digest.setdefault(photo.digest, []).append(photo.path.name)
    for names in by_digest.values():
        if len(names) > 1:
            message = f"{len(names)} copies of one image: {', '.join(names)}. They are all trained on; remove the copies."
            found.append(DataWarning(message, where="copies", given=tuple(names)))
    if resolution is not None:
        small = {p.path.name: p.size for p in photos if min(p.size) < resolution}
        if small:
            sizes = ", ".join(f"{name} ({width} x {height})" for name, (height, width) in small.items())
            message = f"smaller than the training resolution of {resolution}, so they are enlarged and blurred: {sizes}."
            found.append(DataWarning(message, where="size", given=tuple(small), expected=resolution))
    for word in dict.fromkeys(photo.concept or concept for photo in photos):
        own = [p for p in photos if (p.concept or concept) == word and p.caption is not None and not p.is_prior]
        silent = [p.path.name for p in own if word and not mentions(word, p.caption or "")]
        if silent:
            message = f"captions without the concept {word!r}, which is not learned from them: {', '.join(silent)}."
            found.append(DataWarning(message, where="captions", given=tuple(silent), expected=word))
    return found


def _photo(path: Path, caption: str | None, is_prior: bool, limits: PhotoLimits) -> Photo:
    data = read_bytes(path, limits)
    decoded = decode(data, path, limits)
    for note in decoded.notes:
        warnings.warn(DataWarning(f"{path}: {note}", file=path, given=note), stacklevel=3)
    mask = _mask_file(path)
    if mask is not None:
        _check_mask(mask_of(decode(read_bytes(mask, limits), mask, limits), mask), mask, decoded.rgb)
    elif decoded.alpha is not None:
        mask = path
    width, height = decoded.rgb.size
    return Photo(path, hashlib.blake2b(data, digest_size=20).hexdigest(), (height, width), caption, mask, is_prior)


def _check_mask(mask: Image.Image, path: Path, rgb: Image.Image) -> None:
    """A mask may have another size but not another aspect ratio, which would misalign it with the image."""
    if abs(mask.width * rgb.height - mask.height * rgb.width) > max(*mask.size, *rgb.size):
        found, wanted = f"{mask.width} x {mask.height}", f"{rgb.width} x {rgb.height}"
        raise PhotoError(
            f"{path}: a mask of {found} for an image of {wanted}; expected the same aspect ratio. Create it from that image.",
            file=path,
            where="mask",
            given=mask.size,
            expected=rgb.size,
        )


def _mask_file(path: Path) -> Path | None:
    places = (path.parent / f"{path.stem}.mask.png", path.parent / "masks" / f"{path.stem}.png")
    return next((place for place in places if place.is_file()), None)


def _image_paths(source: Path, recursive: bool = False) -> list[Path]:
    if not source.exists():
        raise DataError(f"{source}: no such file or folder. Check the name.", file=source, given="missing")
    if not source.is_dir():
        return [source]
    paths = [path for folder in (_folders(source) if recursive else [source]) for path in _visible(folder) if _is_image(path)]
    nested = (
        []
        if recursive
        else [path for path in _visible(source) if path.is_dir() and path.name != "masks" and any(map(_is_image, _visible(path)))]
    )
    if nested:
        names = ", ".join(f"{path.name}/" for path in nested)
        what = f"{len(paths)} images and subfolders with images: {names}" if paths else f"images in subfolders only: {names}"
        message = f"{source}: {what}; expected one folder of images, such as {nested[0]}, or a dataset with recursive."
        raise DataError(message, file=source, where="subfolders", given=tuple(path.name for path in (*paths, *nested)))
    if not paths:
        others = [path.name + "/" * path.is_dir() for path in _visible(source)]
        content = f"the folder has {', '.join(others[:8])}{' …' * (len(others) > 8)}" if others else "the folder is empty"
        endings = tuple(sorted(READ))
        message = f"{source}: no images; {content}. Expected files ending in {' '.join(endings)}."
        raise DataError(message, file=source, given=tuple(others), expected=endings)
    return paths


def _folders(folder: Path) -> Iterator[Path]:
    """The folder and its subfolders, without masks, hidden ones and links to folders."""
    yield folder
    for path in _visible(folder):
        if path.is_dir() and path.name != "masks" and not path.is_symlink():
            yield from _folders(path)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}). Check permissions.", file=folder, given="unreadable"
        ) from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in READ | REFUSED and not path.name.lower().endswith(".mask.png") and not path.is_dir()


def _unmatched_masks(source: Path, photos: Sequence[Path]) -> Iterator[DataWarning]:
    """Warns about masks without an image."""
    if source.is_dir():
        stems = {photo.stem for photo in photos}
        masks = [(path, path.name[: -len(".mask.png")]) for path in _visible(source) if path.name.endswith(".mask.png")]
        inner = source / "masks"
        masks += [(path, path.stem) for path in _visible(inner) if _is_image(path)] if inner.is_dir() else []
        lost = [str(path.relative_to(source)) for path, stem in masks if stem not in stems]
        if lost:
            message = f"{source}: masks without an image: {', '.join(lost)}."
            yield DataWarning(message, file=source, where="masks", given=tuple(lost))
