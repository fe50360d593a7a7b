"""Batches of pixels and labels, decoded and viewed side by side, in the order that was asked for."""

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from veneer.classifying.examples import Source
from veneer.training.photos import DataError
from veneer.training.seeds import generator


class View(Protocol):
    """What `EvalView` and `TrainView` are."""

    side: int | None

    def __call__(self, picture: Image.Image, epoch: int, index: int) -> Tensor: ...


class Shelf:
    """A source's decoded pictures, kept as far as `limit` bytes go; what is on it stays. Safe in threads.

    Args:
        source: the pictures.
        limit: bytes, three a pixel. 0 keeps none.
        side: pictures with a longer short side are shrunk to it; None keeps them as they are, which an exact eval view needs.
    """

    def __init__(self, source: Source, limit: int = 2**30, side: int | None = None) -> None:
        self.source, self.limit, self.side, self.held = source, limit, side, 0
        self._kept: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._lock = threading.Lock()

    def picture(self, index: int) -> Image.Image:
        """The upright RGB picture at a place of `source.examples`. Raises DataError as `Source.read`."""
        found = self._kept.get(index)
        if found is not None:
            return Image.frombytes("RGB", *found)
        picture = _shrunk(self.source.read(self.source.examples[index]), self.side)
        weight = 3 * picture.width * picture.height
        with self._lock:
            fits = index not in self._kept and self.held + weight <= self.limit
            self.held += weight * fits
            if fits:
                self._kept[index] = (picture.size, picture.tobytes())
        return picture


def shuffled(indices: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The indices in the order of an epoch: a pure function of their order, the seed and the epoch."""
    return [indices[place] for place in torch.randperm(len(indices), generator=generator(seed, "order", epoch)).tolist()]


def batches(
    shelf: Shelf | Source, indices: Sequence[int], view: View, size: int, *, epoch: int = 0, threads: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels `(size, 3, height, width)` float32 and labels `(size,)` int64 of `indices`, in their order; the last batch may be
    smaller. Two batches are made ahead. The same for any number of threads.

    Pillow's warnings are silenced for the process, for filters cannot be set in threads; `check_pictures` has told of them.

    Args:
        shelf: where pictures come from: a shelf to keep them decoded, or a source to decode them each time.
        indices: places in `source.examples`, such as `shuffled(splits.train, seed, epoch)`.
        view: what makes pixels of a picture.
        threads: that decode; None takes as many as there are cores, at most 16.

    Raises:
        DataError: a size below 1; a shelf whose pictures are smaller than the view needs; a picture that cannot be read any more.
    """
    if isinstance(shelf, Source):
        shelf = Shelf(shelf, 0)
    if size < 1:
        raise DataError(f"batches: size is {size}; expected at least 1.")
    if shelf.side is not None and (view.side is None or shelf.side < view.side):
        raise DataError(f"batches: a shelf of side {shelf.side} for a view of side {view.side}. Make it with side=view.side.")
    return _batches(shelf, indices, view, size, epoch, threads or min(16, os.cpu_count() or 1))


def _batches(
    shelf: Shelf, indices: Sequence[int], view: View, size: int, epoch: int, threads: int
) -> Iterator[tuple[Tensor, Tensor]]:
    warnings.filterwarnings("ignore", module=r"PIL\.")
    examples = shelf.source.examples

    def pixels(index: int) -> Tensor:
        return view(shelf.picture(index), epoch, index)

    coming = iter([indices[start : start + size] for start in range(0, len(indices), size)])
    waiting: deque[tuple[Sequence[int], list[Future[Tensor]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in islice(coming, 2):
            waiting.append((batch, [pool.submit(pixels, index) for index in batch]))
        while waiting:
            batch, made = waiting.popleft()
            done = torch.stack([each.result() for each in made])
            for following in islice(coming, 1):
                waiting.append((following, [pool.submit(pixels, index) for index in following]))
            yield done, torch.tensor([examples[index].label for index in batch])
    finally:
        pool.shutdown(cancel_futures=True)


def _shrunk(picture: Image.Image, side: int | None) -> Image.Image:
    short = min(picture.size)
    if side is None or short <= side:
        return picture
    width, height = (max(1, round(length * side / short)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
