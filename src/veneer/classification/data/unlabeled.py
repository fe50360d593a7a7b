"""Images without labels, for methods that train on such."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor

from veneer.injection import methods
from veneer.injection.errors import OptionError

from ..image_paths import find_images
from ..train.batches import Order
from .image_folder import reader
from .labeled_images import Example, Source
from .loader import ImageLoader, View


def read_unlabeled(path: Path, mirror: bool = True) -> Source:
    """Images of a file, a folder at any depth, or a list of paths, all of one class.

    Args:
        mirror: as in `Source`.
    Raises:
        VeneerError: the path does not exist, or has no images.
    """
    files = {str(file): file for file in sorted(find_images([path]))}
    return Source(str(path), ("unlabeled",), tuple(Example(name, 0) for name in files), reader(files), mirror=mirror)


def check_unlabeled(path: Path | None, names: Collection[str]) -> None:
    """Raises `OptionError` for a method that needs unlabeled images without them, or images that no method reads.

    Args:
        path: the option `unlabeled`. `names`: of the methods.
    """
    needing = [name for name in names if methods.get(name).needs_unlabeled]
    if needing and path is None:
        message = f"{needing[0]} trains on images without labels; pass a folder of them with --unlabeled."
        raise OptionError(message, option="unlabeled", method=needing[0], given=None, expected="a folder of images")
    if path is not None and not needing:
        message = f"unlabeled is {path}, but {', '.join(names)} trains on labeled images only. Leave it out, or use pet or ppt."
        raise OptionError(message, option="unlabeled", given=str(path), expected=None)


VIEW_EPOCHS = 2**24
"""Epochs between two views of an image, whose random crops depend on the epoch."""


class UnlabeledImages:
    """Loads the unlabeled images of a step, in a shuffled order as that of labeled ones.

    Args:
        source: the images. `view`: the training transform. `seed`: of the order. `threads`: as in `ImageLoader`.
        evaluation: the transform of evaluation, for methods that label the images, or None.
    """

    def __init__(self, source: Source, view: View, seed: int, threads: int = 0, evaluation: View | None = None) -> None:
        self.source = source
        self.plain = None if evaluation is None else ImageLoader(source, evaluation, threads)
        self.order, self.loader = Order(range(len(source)), seed), ImageLoader(source, view, threads)

    def __call__(self, step: int, rows: list[int], samples: int, view: int = 0) -> Tensor:
        """Images (len(rows), 3, height, width) of a step.

        Args:
            rows: of the step's `samples`. `view`: number of the random crop of each image, from 0.
        Raises:
            DataError: an image cannot be read.
        """
        places = [self.order.at(step * samples + row) for row in rows]
        return self.loader([(epoch + view * VIEW_EPOCHS, index) for epoch, index in places])[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images (size, 3, height, width) in order, with the transform of evaluation."""
        assert self.plain is not None
        return (images for images, _ in self.plain.batches(range(len(self.source)), size))

    def close(self) -> None:
        """Stops the loader threads."""
        self.loader.close()
        if self.plain is not None:
            self.plain.close()
