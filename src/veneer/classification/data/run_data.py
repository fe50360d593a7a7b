"""The pictures of a run: checked, split, and as the model wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from veneer.training.data.image_io import DataError

from ..config import TransferConfig
from ..train.batches import Batch
from .image_checks import check_pictures
from .labeled_images import Source
from .loader import Pixels, Shelf
from .sources import find_pictures
from .split_files import load_splits, save_splits
from .splits import Splits, split
from .transforms import Augmentation, EvalView, TrainView


@dataclass(frozen=True)
class Data:
    """Checked pictures and their splits, with all that was found on the way."""

    source: Source
    splits: Splits
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.source.classes


def open_data(config: TransferConfig, out: Path, progress: Callable[[int, int], None] | None = None) -> Data:
    """Find, check and split the pictures. The splits are in `out/splits.json`; a resumed run keeps those.

    Raises:
        DataError: no pictures, fewer than two classes, or splits without a picture for training, validation or test.
    """
    checked = check_pictures(find_pictures(config.data), folder=out, threads=config.workers or None, progress=progress)
    file = out / "splits.json"
    if config.resume and file.is_file():
        splits = load_splits(file, checked.source)
    else:
        splits = split(checked.source, config.split_seed, validation=config.validation, test=config.test, shots=config.shots)
        save_splits(splits, checked.source, file)
    for name in ("train", "validation", "test"):
        if not getattr(splits, name):
            raise DataError(
                f"{checked.source.where}: no picture for {name}. Give it some, or a share of the others: --validation, --test.",
                file=checked.source.where,
                where=name,
                given=0,
            )
    return Data(checked.source, splits, (*checked.notes, *splits.notes))


class Views:
    """A run's pictures as the model wants them, for training and for looking.

    Args:
        data: the pictures. `entry`: how pictures enter the model (`Classifier.data`).
        augment, squash, seed, workers: as in `TransferConfig`.
    """

    def __init__(
        self, data: Data, entry: Mapping[str, Any], augment: str, *, squash: bool = False, seed: int = 0, workers: int = 0
    ) -> None:
        self.data, self.workers = data, workers
        self.plain = Pixels(Shelf(data.source, 2**28), EvalView(entry, squash=squash), workers)
        self._view = partial(TrainView, entry, cast(Augmentation, augment), mirror=data.source.mirror, squash=squash)
        view = self._view(seed)
        self._shelf = Shelf(data.source, side=view.side)
        self.train = Pixels(self._shelf, view, workers)

    def reseed(self, seed: int) -> None:
        """Draw the augmentation by another seed from here on; what was made ahead is dropped."""
        self.train.close()
        self.train = Pixels(self._shelf, self._view(seed), self.workers)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        """All pictures of a split, in order, as they are looked at."""
        return self.plain.batches(getattr(self.data.splits, split), size)

    def close(self) -> None:
        """End the threads."""
        self.train.close()
        self.plain.close()

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
