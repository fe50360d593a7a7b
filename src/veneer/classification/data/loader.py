"""Pixels and labels, decoded and viewed side by side, in the order that was asked for."""

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

from .labeled_images import Source

Drawn = tuple[int, int]


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


class Pixels:
    """Pictures to pixels and labels, side by side in threads: `pixels([(epoch, index), …])`. The same for any number of threads.

    Pillow's warnings are silenced for the process, for filters cannot be set in threads; `check_pictures` has told of them.

    Args:
        shelf: where pictures come from: a shelf to keep them decoded, or a source to decode them each time.
        view: what makes pixels of a picture.
        threads: that decode; 0 takes as many as there are cores, at most 16.

    Raises:
        DataError: a shelf whose pictures are smaller than the view needs.
    """

    def __init__(self, shelf: Shelf | Source, view: View, threads: int = 0) -> None:
        self.shelf = Shelf(shelf, 0) if isinstance(shelf, Source) else shelf
        self.view = view
        side = self.shelf.side
        if side is not None and (view.side is None or side < view.side):
            message = f"pixels: a shelf of side {side} for a view of side {view.side}. Make it with side=view.side."
            raise DataError(message, where="side", given=side, expected=view.side)
        self._pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1))
        self._coming: dict[Drawn, Future[Tensor]] = {}
        warnings.filterwarnings("ignore", module=r"PIL\.")

    def expect(self, drawn: Sequence[Drawn]) -> None:
        """Begin to make what will be asked for next, without waiting. What is never asked for stays in memory until `close`."""
        for each in drawn:
            if each not in self._coming:
                self._coming[each] = self._pool.submit(self._made, each)

    def __call__(self, drawn: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        """Pixels `(n, 3, height, width)` float32 and labels `(n,)` int64 of n pairs of epoch and place in `source.examples`, in
        their order.

        Raises:
            DataError: a picture that cannot be read any more, or has changed.
        """
        self.expect(drawn)
        found = {each: self._coming.pop(each) for each in dict.fromkeys(drawn)}
        examples = self.shelf.source.examples
        return torch.stack([found[each].result() for each in drawn]), torch.tensor([examples[index].label for _, index in drawn])

    def batches(self, indices: Sequence[int], size: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """All of `indices` in their order, `size` at a time and the last perhaps fewer; one batch is made ahead."""
        if size < 1:
            raise DataError(f"pixels: batches of {size}; expected at least 1.", where="size", given=size, expected=1)
        drawn = [[(epoch, index) for index in indices[start : start + size]] for start in range(0, len(indices), size)]
        for now, following in zip(drawn, [*drawn[1:], []], strict=False):
            self.expect(now + following)
            yield self(now)

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()

    def __enter__(self) -> "Pixels":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _made(self, drawn: Drawn) -> Tensor:
        epoch, index = drawn
        return self.view(self.shelf.picture(index), epoch, index)


def _shrunk(picture: Image.Image, side: int | None) -> Image.Image:
    short = min(picture.size)
    if side is None or short <= side:
        return picture
    width, height = (max(1, round(length * side / short)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
