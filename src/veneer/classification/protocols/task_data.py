"""Splits of a task for the search and for the final training, as its protocol prescribes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from veneer.training.data.image_io import DataError
from veneer.training.data.latent_cache import cache_key

from ..data.benchmark_layouts import IMAGE_FOLDERS, benchmark_reader, coop_lines, image_folder
from ..data.labeled_images import Source, Split
from ..data.run_data import Data
from ..data.splits import Splits
from .benchmark_tasks import COOP, VTAB, Protocol


def open_task(protocol: Protocol, folder: Path, shots: int | None = None, seed: int = 0) -> tuple[Data, Data]:
    """The data of the search and of the final training. Both have the same test split, which is whole.

    VTAB-1k: the search trains on 800 images and validates on 200, the final training uses all 1,000, and its validation metrics
    are of training images. FGVC: the splits of the dataset. CoOp: `shots` images per class and min(shots, 4) for validation.
    Images are not checked, and classes without training images stay in the test split, as in the papers.

    Args:
        shots, seed: of CoOp's few-shot sample.
    Raises:
        DataError: the folder does not have the split files of a benchmark, images are missing, or a split is empty.
    """
    read = benchmark_reader(folder)
    if read is None:
        message = f"{folder}: no split files of {protocol.name}; expected those of the published benchmark. Download them."
        raise DataError(message, file=folder, where="splits", given=None, expected=protocol.name)
    source = read(folder)
    train, validation, test = _members(source, "train"), _members(source, "validation"), _members(source, "test")
    if protocol is VTAB:
        return _data(source, train, validation, test), _data(source, (*train, *validation), validation, test)
    if protocol is COOP and shots is not None:
        names = sample_shots(folder, shots, seed)
        train, validation = (tuple(i for i in split if source.examples[i].name in names) for split in (train, validation))
    data = _data(source, train, validation, test, shots)
    return data, data


def sample_shots(folder: Path, shots: int, seed: int) -> set[str]:
    """Names of the training and validation images of a few-shot sample: `shots` and min(shots, 4) of each class.

    The sample is that of CoOp's code with the same seed: `random.sample` of the images of each class, in the order of the file.
    A class with fewer images contributes all of them, once.

    Source: K. Zhou et al., Dassl.pytorch, `generate_fewshot_dataset`.
    """
    lines = coop_lines(folder)
    start = image_folder(folder, lines[0].path, IMAGE_FOLDERS)
    generator, names = random.Random(seed), set[str]()
    for split, count in (("train", shots), ("validation", min(shots, 4))):
        by_class: dict[str, list[str]] = {}
        for line in lines:
            if line.split == split:
                by_class.setdefault(line.label, []).append(f"{start}/{line.path}" if start else line.path)
        for images in by_class.values():
            if len(images) < count:
                generator.choices(images, k=count)  # the authors repeat images; the state of the generator stays theirs
                names.update(images)
            else:
                names.update(generator.sample(images, count))
    return names


def _members(source: Source, split: Split) -> tuple[int, ...]:
    return tuple(i for i, each in enumerate(source.examples) if each.split == split)


def _data(
    source: Source, train: Iterable[int], validation: tuple[int, ...], test: tuple[int, ...], shots: int | None = None
) -> Data:
    train = tuple(sorted(train))
    for name, members in (("train", train), ("validation", validation), ("test", test)):
        if not members:
            message = f"{source.where}: the {name} split is empty; expected images. Download the split files again."
            raise DataError(message, file=source.where, where=name, given=0, expected=1)
    digest = cache_key(source.digest, *train, "validation", *validation)
    return Data(source, Splits(train, validation, test, 0, shots, (), (), digest), ())
