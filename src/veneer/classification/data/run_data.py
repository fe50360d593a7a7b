"""Data of a run: checked images, their splits, and loaders with the model's transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from veneer.training.data.image_io import DataError

from ..config import TransferConfig
from ..objectives.multi_label import objective_of
from ..objectives.objective import Objective
from ..tasks.task import Task
from ..train.batches import Batch
from .image_checks import check_images
from .labeled_images import Source, Split
from .loader import DecodedImages, ImageLoader
from .sources import open_source
from .split_files import check_options, load_splits, save_splits
from .splits import Splits, split
from .transforms import Augmentation, EvalView, TrainView
from .unlabeled import UnlabeledImages


@dataclass(frozen=True)
class Data:
    """Checked images and their splits, with notes for the user.

    Args:
        tasks: the tasks of a run with several, whose images and classes are in `source` one after the other.
    """

    source: Source
    splits: Splits
    notes: tuple[str, ...]
    tasks: tuple[Task, ...] = ()

    def mirror(self, index: int) -> bool:
        """Whether a mirrored image still belongs to its class; see `Source.mirror`."""
        if not self.tasks:
            return self.source.mirror
        return next(task.mirror for task in self.tasks if index < task.images[1])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.source.classes

    @property
    def objective(self) -> Objective:
        """Targets, loss, metrics and predictions of the images."""
        return objective_of(self.source.multi_label)

    def targets(self, split: Split) -> Tensor:
        """Targets of a split."""
        examples = (self.source.examples[index] for index in getattr(self.splits, split))
        return self.objective.targets([each.labels for each in examples], len(self.classes))


def open_data(config: TransferConfig, out: Path, progress: Callable[[int, int], None] | None = None) -> Data:
    """Reads, checks and splits the images. The splits are saved in `out/splits.json`; a resumed run reuses them.

    Raises:
        DataError: no images, fewer than two classes, an empty training, validation or test split, or splits in `out` that were
            made with other options.
    """
    source = open_source(config.data, config.multi_label)
    checked = check_images(source, folder=out, threads=config.workers or None, progress=progress)
    file = out / "splits.json"
    options = split_options(config)
    if config.resume and file.is_file():
        check_options(file, options)
        splits = load_splits(file, checked.source)
    else:
        splits = split(checked.source, config.split_seed, validation=config.validation, test=config.test, shots=config.shots)
        save_splits(splits, checked.source, file, options)
    require_images(checked.source.where, {name: getattr(splits, name) for name in ("train", "validation", "test")})
    return Data(checked.source, splits, (*checked.notes, *splits.notes))


def split_options(config: TransferConfig) -> dict[str, Any]:
    """The options that splits depend on."""
    return {name: getattr(config, name) for name in ("split_seed", "validation", "test", "shots")}


def require_images(where: str, splits: Mapping[str, Sequence[int]]) -> None:
    """Raises `DataError` if a split is empty."""
    for name, images in splits.items():
        if not images:
            message = f"{where}: the {name} split is empty. Add images, or set fractions with --validation and --test."
            raise DataError(message, file=where, where=name, given=0)


class Views:
    """Loaders of a run's images, with the training and the evaluation transform.

    Args:
        data: the images. `entry`: the model's data config (`Classifier.data`).
        augment, squash, seed, workers: as in `TransferConfig`. `unlabeled`: images without labels, or None.
    """

    def __init__(
        self, data: Data, entry: Mapping[str, Any], augment: str, *, squash: bool = False, seed: int = 0, workers: int = 0,
        unlabeled: Source | None = None,
    ) -> None:  # fmt: skip
        self.data, self.workers = data, workers
        self._evaluation = EvalView(entry, squash=squash)
        self.plain = ImageLoader(DecodedImages(data.source, 2**28), self._evaluation, workers)
        self._view = partial(TrainView, entry, cast(Augmentation, augment), mirror=data.mirror, squash=squash)
        view = self._view(seed)
        self._images = DecodedImages(data.source, side=view.side)
        self.train = ImageLoader(self._images, view, workers)
        self.unlabeled: UnlabeledImages | None = None
        if unlabeled is not None:
            self.unlabeled = self._open_unlabeled(unlabeled, seed)

    def reseed(self, seed: int) -> None:
        """Changes the seed of the augmentation and of the order of unlabeled images; prefetched images are dropped."""
        self.train.close()
        self.train = ImageLoader(self._images, self._view(seed), self.workers)
        if self.unlabeled is not None:
            self.unlabeled.close()
            self.unlabeled = self._open_unlabeled(self.unlabeled.source, seed)

    def _open_unlabeled(self, source: Source, seed: int) -> UnlabeledImages:
        return UnlabeledImages(source, self._view(seed, mirror=source.mirror), seed, self.workers, self._evaluation)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        """Batches of a split, in order, with the evaluation transform."""
        return self.plain.batches(getattr(self.data.splits, split), size)

    def close(self) -> None:
        """Stops the loader threads."""
        self.train.close()
        self.plain.close()
        if self.unlabeled is not None:
            self.unlabeled.close()

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
