"""Dataset of cropped and captioned photos; every batch is a pure function of the seed and the step.

Order: each bucket is a sequence of permutations of its samples, seeded by (seed, bucket, number of the permutation), so every
photo is used once before any is used twice, and every batch is full and of one size. The bucket of a step comes from a
permutation that contains each bucket as often as it has samples, so that photos with rare aspect ratios are not oversampled.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..loop.seeds import generator
from .buckets import Crop, Placement, Size, covering_size, place_crop
from .buckets import count as count_buckets
from .captions import Captions
from .image_io import DataError, PhotoLimits, decode, mask_of, read_bytes
from .latent_cache import Memory, cache_key
from .photo_folder import Photo, find_photos
from .photo_source import PhotoSource

__all__ = ["DataError", "Example", "Photo", "PhotoDataset", "PhotoSource", "find_photos"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One sample of a batch, on the CPU.

    Args:
        pixels: `(3, height, width)`, float32 in [-1, 1].
        mask: `(1, height, width)`, float32 in [0, 1], or None if the loss is not masked.
        caption: caption of this sample; empty after caption dropout.
        size: SDXL's micro-conditioning: original height, width; crop top, left; target height, width; pixels.
        key: digest of the file's bytes and of its preprocessing, for caches; does not depend on the caption.
        index: number of this sample in the run, counted over steps and batches; seeds its noise and timestep.
        is_prior: True for a class image.
        guide: `(3, height, width)`, float32 in [0, 1]: a control map from a file, cropped as the image is.
    """

    pixels: Tensor
    mask: Tensor | None
    caption: str
    size: tuple[int, int, int, int, int, int]
    key: str
    index: int
    is_prior: bool = False
    guide: Tensor | None = None


class _Resized(NamedTuple):
    pixels: Tensor
    mask: Tensor | None
    guide: Tensor | None = None


class _Entry(NamedTuple):
    """A photo with the source whose options apply to it."""

    photo: Photo
    source: PhotoSource


class PhotoDataset:
    """Batches of a folder of photos; `from_sources` mixes several datasets.

    Args:
        photos: photos of the subject, from `find_photos`.
        resolution: the area of a bucket is at most its square, pixels.
        multiple: sides are multiples of this.
        seed: random seed of order, crops, flips and captions.
        captions: caption templates and augmentation.
        flip: probability of horizontal flips, 0 to 1. Use 0 for faces, text and other subjects that are not symmetric.
        crop: position of the crop, `center` or `random`.
        repeats: how often each photo occurs in an epoch.
        buckets: aspect-ratio buckets; if False all photos are cropped to squares.
        upscale: enlarge small images; see `BucketPlan`.
        masks: return the photos' masks with the examples.
        prior_photos: class images; every batch is followed by as many of them, cropped to the same size.
        guide: returns the control map of a photo, resized to (height, width).
        limits: limits on image files.
        memory: bytes of resized images kept in memory.

    Raises:
        DataError: no photos, an invalid option, or a photo without a caption or template.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        resolution: int,
        multiple: int,
        seed: int,
        *,
        captions: Captions = Captions(),  # noqa: B008 (frozen)
        flip: float = 0.0,
        crop: Crop = "center",
        repeats: int = 1,
        buckets: bool = True,
        upscale: bool = True,
        masks: bool = True,
        prior_photos: Sequence[Photo] = (),
        guide: Callable[[Photo, Size], Image.Image] | None = None,
        limits: PhotoLimits = PhotoLimits(),  # noqa: B008 (frozen)
        memory: int = 2**29,
    ) -> None:
        options: dict[str, Any] = {"captions": captions, "flip": flip, "crop": crop, "masks": masks}
        source = PhotoSource(photos, (resolution,), repeats=repeats, buckets=buckets, upscale=upscale, **options)
        prior = PhotoSource(prior_photos, (resolution,), **options)
        self._fill([source], [prior], multiple, seed, guide, limits, memory)

    @classmethod
    def from_sources(
        cls,
        sources: Sequence[PhotoSource],
        multiple: int,
        seed: int,
        *,
        prior: Sequence[PhotoSource] = (),
        limits: PhotoLimits = PhotoLimits(),  # noqa: B008 (frozen)
        memory: int = 2**29,
    ) -> "PhotoDataset":
        """Batches of several datasets. A batch has samples of one size, of any of the datasets with photos of that size.

        Args:
            sources: datasets of the subjects. `prior`: datasets of class images.
            multiple, seed, limits, memory: see the class.
        Raises:
            DataError: no photos, or an invalid resolution.
        """
        dataset = cls.__new__(cls)
        dataset._fill(sources, prior, multiple, seed, None, limits, memory)
        return dataset

    def _fill(
        self,
        sources: Sequence[PhotoSource],
        prior: Sequence[PhotoSource],
        multiple: int,
        seed: int,
        guide: Callable[[Photo, Size], Image.Image] | None,
        limits: PhotoLimits,
        memory: int,
    ) -> None:
        self.photos = tuple(photo for source in sources for photo in source.photos)
        self.prior_photos = tuple(photo for source in prior for photo in source.photos)
        if not self.photos:
            raise DataError("dataset: no photos; expected at least one, see find_photos.", where="photos", given=0)
        self.sources, self.seed, self.guide, self.limits = (*sources, *prior), seed, guide, limits
        self._decks: dict[Size, list[_Entry]] = {}
        for source in sources:
            for bucket, photo in source.placements(multiple):
                self._decks.setdefault(bucket, []).append(_Entry(photo, source))
        self._prior = [_Entry(photo, source) for source in prior for photo in source.photos for _ in range(source.repeats)]
        self._turns = [bucket for bucket, deck in self._decks.items() for _ in deck]
        self._memory: Memory[_Resized] = Memory(memory)

    def __len__(self) -> int:
        """Samples in one epoch: photos times repeats and resolutions, without class images."""
        return len(self._turns)

    @property
    def counts(self) -> dict[Size, int]:
        """Number of samples by bucket `(height, width)`, largest first."""
        return count_buckets(self._turns)

    @property
    def cacheable(self) -> bool:
        """Whether latents are worth caching: True for center crops, False for random crops, which rarely repeat."""
        return all(source.crop == "center" for source in self.sources)

    @property
    def varies_captions(self) -> bool:
        """Whether captions differ from epoch to epoch, so that few of their embeddings repeat."""
        return any(s.captions.varies(photo.caption) for s in self.sources for photo in s.photos)

    def examples(self, step: int, batch: int, rows: Sequence[int] | None = None) -> list[Example]:
        """Rows of the global batch of a step: `batch` photos of one bucket and, if there are class images, `batch` of these.

        An example depends on the seed, the step, the batch size and its row only, so a micro-batch or a process loads its own
        rows and nothing else.

        Args:
            step: counted from 0. `batch`: photos in the global batch.
            rows: positions in the global batch, 0 to `batch - 1` (default: all).

        Returns:
            The photos of `rows`, then the class images of `rows`.
        """
        if step < 0 or batch < 1:
            message = f"examples: step {step}, batch {batch}; expected a step from 0 and a batch of at least 1."
            raise DataError(message, where="examples", given=(step, batch))
        rows = range(batch) if rows is None else rows
        bucket, before = self._turn(step)
        name = f"{bucket[0]}x{bucket[1]}"
        first = step * (2 * batch if self.prior_photos else batch)
        entries = [_deal(self._decks[bucket], before * batch + row, self.seed, name) for row in rows]
        examples = [self._example(entry, bucket, step, first + row) for row, entry in zip(rows, entries, strict=True)]
        if self.prior_photos:
            images = [_deal(self._prior, step * batch + row, self.seed, "prior") for row in rows]
            examples += [self._example(image, bucket, step, first + batch + row) for row, image in zip(rows, images, strict=True)]
        return examples

    def _turn(self, step: int) -> tuple[Size, int]:
        """The bucket of a step, and the number of earlier steps with that bucket."""
        cycle, position = divmod(step, len(self._turns))
        order = _shuffled(len(self._turns), self.seed, "turn", cycle)
        bucket = self._turns[order[position]]
        return bucket, cycle * len(self._decks[bucket]) + sum(self._turns[i] == bucket for i in order[:position])

    def _example(self, entry: _Entry, bucket: Size, step: int, index: int) -> Example:
        photo, source = entry
        window = place_crop(photo.size, bucket, source.crop, source.flip, generator(self.seed, "window", step, index))
        return self.crop_example(
            photo, source, window, source.captions.sample(photo.caption, self.seed, step, index, photo.is_prior), index
        )

    def crop_example(self, photo: Photo, source: PhotoSource, window: Placement, caption: str, index: int) -> Example:
        """The example of a crop of a photo, with a caption."""
        whole = self._resized(photo, window.bucket, source.masks)
        key = cache_key("picture", photo.digest, PIL.__version__, *self.limits.background, *_flat(window))
        pixels = _crop(whole.pixels, window) / 127.5 - 1
        mask = None if whole.mask is None else _crop(whole.mask, window) / 255
        guide = None if whole.guide is None else _crop(whole.guide, window) / 255
        return Example(pixels, mask, caption, window.micro(photo.size), key, index, photo.is_prior, guide)

    def _resized(self, photo: Photo, bucket: Size, masks: bool) -> _Resized:
        """The photo resized to cover the bucket, uint8, cached in memory."""
        name = f"{photo.path}:{bucket}:{masks}"
        resized = self._memory.get(name)
        if resized is None:
            resized = self._decode(photo, covering_size(photo.size, bucket), masks)
            self._memory.put(name, resized, sum(each.numel() for each in resized if each is not None))
        return resized

    def _decode(self, photo: Photo, size: Size, masks: bool) -> _Resized:
        data = read_bytes(photo.path, self.limits)
        if hashlib.blake2b(data, digest_size=20).hexdigest() != photo.digest:
            message = f"{photo.path}: the file has changed since it was first read. Do not modify photos during a run."
            raise DataError(message, file=photo.path, given="changed")
        image = decode(data, photo.path, self.limits)
        pixels = pil_to_tensor(image.rgb.resize(size[::-1], Image.Resampling.LANCZOS))
        guide = None if self.guide is None else pil_to_tensor(self.guide(photo, size))
        if not masks or photo.mask is None:
            return _Resized(pixels, None, guide)
        is_alpha = photo.mask == photo.path
        mask = mask_of(image if is_alpha else decode(read_bytes(photo.mask, self.limits), photo.mask, self.limits), photo.mask)
        return _Resized(pixels, pil_to_tensor(mask.resize(size[::-1], Image.Resampling.BILINEAR)), guide)


def _crop(whole: Tensor, window: Placement) -> Tensor:
    part = whole[:, window.top : window.top + window.bucket[0], window.left : window.left + window.bucket[1]].float()
    return part.flip(-1) if window.flip else part


def _flat(window: Placement) -> tuple[int, ...]:
    return (*window.resized, *window.bucket, window.top, window.left, int(window.flip))


def _deal(items: Sequence[Item], number: int, seed: int, name: str) -> Item:
    """Item `number` of an endless sequence in which every `len(items)` items are a new permutation of `items`."""
    permutation, position = divmod(number, len(items))
    return items[_shuffled(len(items), seed, name, permutation)[position]]


@lru_cache(maxsize=256)
def _shuffled(length: int, seed: int, word: str, deck: int) -> tuple[int, ...]:
    return tuple(torch.randperm(length, generator=generator(seed, "order", word, deck)).tolist())
