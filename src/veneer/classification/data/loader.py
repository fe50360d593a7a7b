"""Multithreaded loader of pixels and labels, with a cache of decoded images."""

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from veneer.training.data.image_io import DataError

from ..objectives.multi_label import objective_of
from .labeled_images import Source

SampleKey = tuple[int, int]
"""Epoch, and index in `Source.examples`."""


class View(Protocol):
    """A transform of images to pixels: `EvalView` or `TrainView`."""

    side: int | None

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor: ...


class DecodedImages:
    """Cache of a source's decoded images up to `limit` bytes, without eviction. Thread-safe.

    Args:
        source: the images.
        limit: size in bytes, three per pixel. 0 caches nothing.
        side: images are downscaled to this short side; None keeps the original size, which an exact evaluation view needs.
    """

    def __init__(self, source: Source, limit: int = 2**30, side: int | None = None) -> None:
        self.source, self.limit, self.side, self.size = source, limit, side, 0
        self._cache: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._lock = threading.Lock()

    def image(self, index: int) -> Image.Image:
        """The RGB image of an index in `source.examples`. Raises DataError as `Source.read`."""
        cached = self._cache.get(index)
        if cached is not None:
            return Image.frombytes("RGB", *cached)
        image = _downscale(self.source.read(self.source.examples[index]), self.side)
        size = 3 * image.width * image.height
        with self._lock:
            fits = index not in self._cache and self.size + size <= self.limit
            self.size += size * fits
            if fits:
                self._cache[index] = (image.size, image.tobytes())
        return image


class ImageLoader:
    """Loads pixels and labels in threads: `loader([(epoch, index), …])`. The result does not depend on the number of threads.

    Silences Pillow's warnings in the process, because filters cannot be set per thread; `check_images` has reported them.

    Args:
        images: a cache of decoded images, or a source, whose images are decoded each time.
        view: the transform.
        threads: decoder threads; 0 for one per core, at most 16.

    Raises:
        DataError: the cached images are smaller than the view needs.
    """

    def __init__(self, images: DecodedImages | Source, view: View, threads: int = 0) -> None:
        self.images = DecodedImages(images, 0) if isinstance(images, Source) else images
        self.view = view
        self.objective = objective_of(self.images.source.multi_label)
        side = self.images.side
        if side is not None and (view.side is None or side < view.side):
            message = f"ImageLoader: images of side {side}; expected at least {view.side} for this view. Pass side=view.side."
            raise DataError(message, where="side", given=side, expected=view.side)
        self._pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1))
        self._pending: dict[SampleKey, Future[Tensor]] = {}
        warnings.filterwarnings("ignore", module=r"PIL\.")

    def prefetch(self, samples: Sequence[SampleKey]) -> None:
        """Starts loading samples without waiting. Samples that are never requested stay in memory until `close`."""
        for each in samples:
            if each not in self._pending:
                self._pending[each] = self._pool.submit(self._load, each)

    def __call__(self, samples: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """Pixels `(n, 3, height, width)` float32 and targets of n samples, in their order: labels `(n,)` int64, or of images with
        several labels 0 and 1 `(n, classes)` float32.

        Raises:
            DataError: an image that can no longer be read, or has changed.
        """
        self.prefetch(samples)
        pending = {each: self._pending.pop(each) for each in dict.fromkeys(samples)}
        source = self.images.source
        targets = self.objective.targets([source.examples[i].labels for _, i in samples], len(source.classes))
        return torch.stack([pending[each].result() for each in samples]), targets

    def batches(self, indices: Sequence[int], size: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all `indices` in order, the last possibly smaller; the next batch is prefetched."""
        if size < 1:
            raise DataError(f"ImageLoader: batch size {size}; expected at least 1.", where="size", given=size, expected=1)
        batches = [[(epoch, index) for index in indices[start : start + size]] for start in range(0, len(indices), size)]
        for current, following in zip(batches, [*batches[1:], []], strict=False):
            self.prefetch(current + following)
            yield self(current)

    def close(self) -> None:
        """Stops the threads and cancels pending samples."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _load(self, sample: SampleKey) -> Tensor:
        epoch, index = sample
        return self.view(self.images.image(index), epoch, index)


def _downscale(image: Image.Image, side: int | None) -> Image.Image:
    short = min(image.size)
    if side is None or short <= side:
        return image
    width, height = (max(1, round(length * side / short)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
