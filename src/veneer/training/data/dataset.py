"""Which pictures a step sees, cropped and captioned: a pure function of the seed and the step.

Order. Every bucket deals its samples from decks that are shuffled by (seed, bucket, deck number), one deck after the other, so
each photo is seen once before any is seen twice, and every batch is full and of one size. Which bucket has its turn is dealt the
same way, from a deck that holds each bucket as often as it has samples, so that photos of rare shapes are not favoured.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..loop.seeds import generator
from .buckets import BucketPlan, Crop, Placement, Size, cover, place
from .buckets import count as count_buckets
from .captions import Captions
from .image_io import DataError, PhotoLimits, decode, mask_of, read_bytes
from .latent_cache import Memory, cache_key
from .photo_folder import Photo, concerns, find_photos

__all__ = ["DataError", "Example", "Photo", "PhotoDataset", "concerns", "find_photos"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One sample of a batch, on the CPU.

    Args:
        pixels: `(3, height, width)`, float32 in [-1, 1].
        mask: `(1, height, width)`, float32 in [0, 1], or None where all of the picture counts.
        caption: the words for this sample; may be empty (dropout).
        size: SDXL's micro-conditioning: original height, width; crop top, left; target height, width; pixels.
        key: digest of the file's bytes and of all that was done to them, for caches; the caption is not part of it.
        index: number of this sample in the run, counted over steps and batches; seed its noise and timestep with it.
        is_prior: a class picture.
        guide: `(3, height, width)`, float32 in [0, 1]: a map that someone made, placed as the picture is.
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


class PhotoDataset:
    """Batches of a folder of photos.

    Args:
        photos: the subject's pictures, from `find_photos`.
        resolution: area of a bucket is at most its square, pixels.
        multiple: sides are multiples of this.
        seed: of every draw.
        captions: where words come from where a photo has none, and how they vary.
        flip: probability of mirroring, 0 to 1. Leave 0 for faces, lettering and whatever has a left and a right.
        crop: where the window lies on a picture that covers its bucket.
        repeats: how often a photo lies in one deck; it sets the length of an epoch.
        buckets: buckets by aspect ratio; if False all is cropped to a square.
        upscale: enlarge small pictures; see `BucketPlan`.
        masks: give the photos' masks with the examples.
        prior_photos: class pictures; every batch is then followed by as many of them, cropped to the same size.
        guide: a photo's map, as a picture of (height, width); given with the examples.
        limits: how files are read.
        memory: bytes of resized pictures to keep.

    Raises:
        DataError: no photos, a wrong option, a photo for which there are no words.
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
        _check_options(photos, flip, crop, repeats)
        _check_words(captions, [*photos, *prior_photos])
        self.photos, self.prior_photos, self.captions = tuple(photos), tuple(prior_photos), captions
        self.seed, self.flip, self.crop, self.masks, self.limits = seed, flip, crop, masks, limits
        self.guide = guide
        self.plan = BucketPlan(resolution, multiple, square=not buckets, upscale=upscale)
        self._decks: dict[Size, list[Photo]] = {}
        for photo in self.photos:
            self._decks.setdefault(self.plan.choose(photo.size), []).extend([photo] * repeats)
        self._turns = [bucket for bucket, deck in self._decks.items() for _ in deck]
        self._memory: Memory[_Resized] = Memory(memory)

    def __len__(self) -> int:
        """Samples in one epoch: photos times repeats, without class pictures."""
        return len(self._turns)

    @property
    def counts(self) -> dict[Size, int]:
        """Samples in each bucket `(height, width)`, most first."""
        return count_buckets(self._turns)

    @property
    def cacheable(self) -> bool:
        """Whether a photo yields the same few pixels again and again, so that latents are worth keeping: not with random
        crops."""
        return self.crop == "center"

    def examples(self, step: int, batch: int, rows: Sequence[int] | None = None) -> list[Example]:
        """Rows of the global batch of a step: `batch` photos of one bucket and, if there are class images, `batch` of these.

        An example depends on the seed, the step, the batch size and its row only, so a micro-batch or a process loads its own
        rows and nothing else.

        Args:
            step: counted from 0. `batch`: photos in the global batch.
            rows: positions in the global batch, 0 to `batch - 1`; None for all.

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
        photos = [_deal(self._decks[bucket], before * batch + row, self.seed, name) for row in rows]
        examples = [self._example(photo, bucket, step, first + row) for row, photo in zip(rows, photos, strict=True)]
        if self.prior_photos:
            images = [_deal(self.prior_photos, step * batch + row, self.seed, "prior") for row in rows]
            examples += [self._example(image, bucket, step, first + batch + row) for row, image in zip(rows, images, strict=True)]
        return examples

    def _turn(self, step: int) -> tuple[Size, int]:
        """The bucket of a step, and how many earlier steps were that bucket's."""
        cycle, now = divmod(step, len(self._turns))
        order = _shuffled(len(self._turns), self.seed, "turn", cycle)
        bucket = self._turns[order[now]]
        return bucket, cycle * len(self._decks[bucket]) + sum(self._turns[i] == bucket for i in order[:now])

    def _example(self, photo: Photo, bucket: Size, step: int, index: int) -> Example:
        window = place(photo.size, bucket, self.crop, self.flip, generator(self.seed, "window", step, index))
        whole = self._resized(photo, bucket)
        caption = self.captions.draw(photo.caption, self.seed, step, index, photo.is_prior)
        key = cache_key("picture", photo.digest, PIL.__version__, *self.limits.background, *_flat(window))
        pixels = _seen(whole.pixels, window) / 127.5 - 1
        mask = None if whole.mask is None else _seen(whole.mask, window) / 255
        guide = None if whole.guide is None else _seen(whole.guide, window) / 255
        return Example(pixels, mask, caption, window.micro(photo.size), key, index, photo.is_prior, guide)

    def _resized(self, photo: Photo, bucket: Size) -> _Resized:
        """The whole photo, resized to cover the bucket; 8 bits, kept in memory."""
        name = f"{photo.path}:{bucket}"
        found = self._memory.get(name)
        if found is None:
            found = self._decoded(photo, cover(photo.size, bucket))
            weight = sum(each.numel() for each in found if each is not None)
            self._memory.put(name, found, weight)
        return found

    def _decoded(self, photo: Photo, size: Size) -> _Resized:
        data = read_bytes(photo.path, self.limits)
        if hashlib.blake2b(data, digest_size=20).hexdigest() != photo.digest:
            message = f"{photo.path}: the file has changed since it was first read. Keep photos as they are during a run."
            raise DataError(message, file=photo.path, given="changed")
        picture = decode(data, photo.path, self.limits)
        pixels = pil_to_tensor(picture.rgb.resize(size[::-1], Image.Resampling.LANCZOS))
        guide = None if self.guide is None else pil_to_tensor(self.guide(photo, size))
        if not self.masks or photo.mask is None:
            return _Resized(pixels, None, guide)
        own = photo.mask == photo.path
        mask = mask_of(picture if own else decode(read_bytes(photo.mask, self.limits), photo.mask, self.limits), photo.mask)
        return _Resized(pixels, pil_to_tensor(mask.resize(size[::-1], Image.Resampling.BILINEAR)), guide)


def _seen(whole: Tensor, window: Placement) -> Tensor:
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


def _check_options(photos: Sequence[Photo], flip: float, crop: str, repeats: int) -> None:
    if not photos:
        raise DataError("dataset: no photos. Give at least one; see find_photos.", where="photos", given=0)
    if not 0.0 <= flip <= 1.0:
        raise DataError(f"dataset: flip is {flip}; expected a probability from 0 to 1.", where="flip", given=flip)
    if crop not in ("center", "random"):
        raise DataError(f"dataset: crop is {crop!r}; expected 'center' or 'random'.", where="crop", given=crop)
    if repeats < 1:
        raise DataError(f"dataset: repeats is {repeats}; expected at least 1.", where="repeats", given=repeats)


def _check_words(captions: Captions, photos: Sequence[Photo]) -> None:
    silent = [photo for photo in photos if captions.lacks(photo.caption, photo.is_prior)]
    if silent:
        names = ", ".join(photo.path.name for photo in silent[:8])
        remedy = "the class prompt (prior)" if silent[0].is_prior else "a concept"
        message = f"dataset: no words for {names}. Give {remedy}, or write captions beside the pictures."
        expected = "prior" if silent[0].is_prior else "concept"
        raise DataError(message, where="captions", given=tuple(photo.path.name for photo in silent), expected=expected)
