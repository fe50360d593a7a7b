"""Photos of one dataset with the options of their samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .buckets import BucketPlan, Crop, Size
from .captions import Captions
from .image_io import DataError
from .photo_folder import Photo


@dataclass(frozen=True)
class PhotoSource:
    """Photos of one dataset with the options of their samples.

    Args:
        photos: photos of the subject, or class images.
        resolutions: the area of a bucket is at most the square of one of these, pixels; an epoch has each photo at each of them.
        captions: caption templates and augmentation.
        flip: probability of horizontal flips, 0 to 1.
        crop: position of the crop, `center` or `random`.
        repeats: how often each photo occurs in an epoch.
        buckets: aspect-ratio buckets; if False all photos are cropped to squares.
        upscale, min_side, max_side: see `BucketPlan`.
        masks: return the photos' masks with the examples.

    Raises:
        DataError: an invalid option, or a photo without a caption or template.
    """

    photos: Sequence[Photo]
    resolutions: Sequence[int]
    captions: Captions = field(default_factory=Captions)
    flip: float = 0.0
    crop: Crop = "center"
    repeats: int = 1
    buckets: bool = True
    upscale: bool = True
    min_side: int | None = None
    max_side: int | None = None
    masks: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip <= 1.0:
            raise self._wrong("flip", "a probability from 0 to 1")
        if self.crop not in ("center", "random"):
            raise self._wrong("crop", "'center' or 'random'")
        if self.repeats < 1:
            raise self._wrong("repeats", "at least 1")
        if not self.resolutions:
            raise self._wrong("resolutions", "at least one")
        self._check_captions()

    def _wrong(self, name: str, expected: str) -> DataError:
        given = getattr(self, name)
        return DataError(f"dataset: {name} is {given!r}; expected {expected}.", where=name, given=given)

    def _check_captions(self) -> None:
        missing = [photo for photo in self.photos if self.captions.lacks(photo.caption, photo.is_prior)]
        if missing:
            names = ", ".join(photo.path.name for photo in missing[:8])
            remedy = "the class prompt (prior)" if missing[0].is_prior else "a concept"
            message = f"dataset: no caption for {names}. Set {remedy}, or add caption files beside the images."
            expected = "prior" if missing[0].is_prior else "concept"
            raise DataError(message, where="captions", given=tuple(photo.path.name for photo in missing), expected=expected)

    def placements(self, multiple: int) -> Iterator[tuple[Size, Photo]]:
        """The bucket of each photo at each resolution, repeated.

        Args:
            multiple: sides are multiples of this.
        Raises:
            DataError: a resolution that is not such a multiple.
        """
        for resolution in dict.fromkeys(self.resolutions):
            plan = BucketPlan(
                resolution, multiple, self.min_side, self.max_side, square=not self.buckets, upscale=self.upscale
            )  # fmt: skip
            for photo in self.photos:
                bucket = plan.choose(photo.size)
                yield from [(bucket, photo)] * self.repeats

    def texts(self) -> list[str]:
        """The longest captions of all photos, without duplicates."""
        return list(dict.fromkeys(text for p in self.photos for text in self.captions.longest(p.caption, p.is_prior)))
