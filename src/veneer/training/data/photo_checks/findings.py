"""Findings about training photos: each has the photo, the measured value, the threshold and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..buckets import Size, visible_share
from ..dataset import PhotoDataset
from ..image_io import PhotoLimits, decode, mask_of, read_bytes
from ..photo_folder import Photo
from . import measures


@dataclass(frozen=True)
class PhotoCheck:
    """A check of photos.

    Args:
        measure: what is measured, with its range. `threshold`: limit of the value.
        is_maximum: True if values above the threshold are findings, False if those below are.
        remedy: what to do.
    """

    measure: str
    threshold: float
    is_maximum: bool
    remedy: str

    def rejects(self, value: float) -> bool:
        """True for a value beyond the threshold."""
        return value > self.threshold if self.is_maximum else value < self.threshold


CHECKS: Mapping[str, PhotoCheck] = {
    "blur": PhotoCheck(
        "blur of its sharpest part at the training size (0 sharp, 1 blurred)", 0.6, True,
        "the model learns blur; use a sharper photo",
    ),
    "dark": PhotoCheck(
        "luminance of its brightest tenth (0 black, 1 white)", 0.35, False, "too dark; brighten it, or use another photo"
    ),
    "bright": PhotoCheck(
        "luminance of its darkest tenth (0 black, 1 white)", 0.9, True, "too bright; darken it, or use another photo"
    ),
    "near duplicate": PhotoCheck(
        f"bits of the perceptual hash, of {measures.HASH_BITS}, that differ", 9, False,
        "it counts twice in training; keep one of the two",
    ),
    "aspect ratio": PhotoCheck(
        "share of the photo that the center crop keeps", 0.6, False,
        "the rest is cut off; crop it around the subject yourself",
    ),
    "cut off": PhotoCheck(
        "share of the subject's mask that the center crop keeps", 0.9, False,
        "the subject is cut off; crop the photo around it yourself",
    ),
    "small subject": PhotoCheck(
        "share of the center crop that the subject's mask fills", 0.05, False,
        "the subject is too small to learn details; crop the photo around it",
    ),
}  # fmt: skip
"""Name of a finding to its check. On 122 photos of 23 subjects the thresholds give one finding: a photo and its mirror image."""
MOST = 300
"""Largest number of photos that a run checks, each for about 0.1 s."""


@dataclass(frozen=True)
class PhotoFinding:
    """A probable problem of a photo, which is trained on all the same.

    Args:
        check: name in `CHECKS`.
        photo: file of the photo. `other`: that of its near duplicate.
        value: what was measured. `threshold`: limit of the check.
    """

    check: str
    photo: Path
    value: float
    threshold: float
    other: Path | None = None

    def __str__(self) -> str:
        check = CHECKS[self.check]
        pair = f" and {self.other.name}" if self.other else ""
        bound = "at most" if check.is_maximum else "at least"
        value, threshold = (f"{number:.3g}" for number in (self.value, self.threshold))
        return f"{self.photo.name}{pair}: {self.check}: {check.measure}: {value}; expected {bound} {threshold}: {check.remedy}"

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON values, with file names instead of paths."""
        other = {"other": self.other.name} if self.other else {}
        return {"check": self.check, "photo": self.photo.name, "value": self.value, "threshold": self.threshold, **other}


def check_photos(
    placements: Iterable[tuple[Size, Photo]],
    limits: PhotoLimits = PhotoLimits(),  # noqa: B008 (frozen)
) -> list[PhotoFinding]:
    """Measures the photos of a subject, one after another, and compares them with `CHECKS`.

    `cut off` and `small subject` need a mask, because nothing else shows where the subject is; faces are not detected. Photos of
    equal digests count once.

    Args:
        placements: (height, width) in pixels of the bucket of each photo, and the photo; of several buckets the first is used.
    Raises:
        PhotoError: a file that cannot be decoded.
    """
    unique: dict[str, tuple[Size, Photo]] = {}
    for bucket, photo in placements:
        unique.setdefault(photo.digest, (bucket, photo))
    findings: list[PhotoFinding] = []
    hashes: list[tuple[Photo, np.ndarray, np.ndarray]] = []
    for bucket, photo in unique.values():
        decoded = decode(read_bytes(photo.path, limits), photo.path, limits)
        findings += _findings(photo, bucket, decoded.rgb, _mask(photo, limits))
        hashes.append((photo, measures.image_hash(decoded.rgb), measures.image_hash(_mirror(decoded.rgb))))
    return [*findings, *_near_duplicates(hashes)]


def dataset_findings(dataset: PhotoDataset, multiple: int) -> list[PhotoFinding]:
    """Findings about the first `MOST` photos of a dataset, without class images; see `check_photos`.

    Args:
        multiple: sides of buckets are multiples of this.
    """
    placements = [placed for source in dataset.sources for placed in source.placements(multiple) if not placed[1].is_prior]
    return check_photos(placements[:MOST], dataset.limits)


def _findings(photo: Photo, bucket: Size, image: Image.Image, mask: Image.Image | None) -> Iterator[PhotoFinding]:
    crop = measures.center_crop(image, bucket)
    low, high = measures.brightness(crop, mask and measures.center_crop(mask.resize(image.size), bucket))
    values = {
        "blur": measures.blur(crop), "dark": high, "bright": low, "aspect ratio": visible_share(photo.size, bucket)
    }  # fmt: skip
    if mask is not None:
        values["cut off"], values["small subject"] = measures.subject_shares(mask.resize(image.size), bucket)
    for name, value in values.items():
        if CHECKS[name].rejects(value):
            yield PhotoFinding(name, photo.path, value, CHECKS[name].threshold)


def _near_duplicates(hashes: Sequence[tuple[Photo, np.ndarray, np.ndarray]]) -> Iterator[PhotoFinding]:
    """Pairs of photos of which one looks like the other, or like its mirror image."""
    check = CHECKS["near duplicate"]
    for i, (photo, bits, _) in enumerate(hashes):
        if not hashes[i + 1 :]:
            continue
        others = np.stack([each[1:] for each in hashes[i + 1 :]])
        distances = (others != bits).sum(-1).min(-1)
        for distance, (other, *_) in zip(distances.tolist(), hashes[i + 1 :], strict=True):
            if check.rejects(distance):
                yield PhotoFinding("near duplicate", photo.path, float(distance), check.threshold, other.path)


def _mask(photo: Photo, limits: PhotoLimits) -> Image.Image | None:
    if photo.mask is None:
        return None
    return mask_of(decode(read_bytes(photo.mask, limits), photo.mask, limits), photo.mask)


def _mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
