"""Photos of a run: its datasets, class images, and photos that are held out for validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..loop.seeds import mix
from .captions import mentions
from .dataset_tables import DatasetTable, RunOptions, dataset_tables
from .image_io import DataError
from .photo_folder import Photo, find_photos
from .photo_source import PhotoSource
from .tar_shards import extract_shards, shards_of


@dataclass(frozen=True)
class TablePhotos:
    """A dataset and its photos.

    Args:
        index: position of the table in `dataset_tables`.
    """

    index: int
    table: DatasetTable
    photos: tuple[Photo, ...]

    def source(self, resolution: int) -> PhotoSource:
        """The photos with the options of their samples.

        Args:
            resolution: if the table has none.
        """
        table = self.table
        return PhotoSource(
            self.photos,
            table.resolution or (resolution,),
            table.captions(),
            flip=table.flip or 0.0,
            crop=table.crop or "center",
            repeats=table.repeats,
            buckets=table.buckets is not False,
            upscale=table.upscale,
            min_side=table.min_side,
            max_side=table.max_side,
            masks=table.masks is not False,
        )


@dataclass(frozen=True)
class RunPhotos:
    """Photos of a run.

    Args:
        parts: its datasets. `held_out`: photos of them that are held out, also those of datasets for validation.
    """

    parts: tuple[TablePhotos, ...]
    held_out: tuple[TablePhotos, ...] = ()

    @property
    def training(self) -> list[TablePhotos]:
        """Datasets of the subjects."""
        return [part for part in self.parts if part.table.is_trained]

    @property
    def regularization(self) -> list[TablePhotos]:
        """Datasets of class images."""
        return [part for part in self.parts if part.table.regularization]

    @property
    def photos(self) -> list[Photo]:
        """Photos of the subjects."""
        return [photo for part in self.training for photo in part.photos]

    def of_concept(self, token: str) -> list[Photo]:
        """Photos of one concept, without duplicates."""
        own = [photo for part in self.training if part.table.concept == token for photo in part.photos]
        return list({photo.digest: photo for photo in own}.values())

    def with_texts(self, config: RunOptions, rename: Callable[[str], str] = str) -> RunPhotos:
        """The photos with the tables of a config in which only texts and concepts differ.

        Args:
            rename: of captions.
        """
        tables = dataset_tables(config)

        def changed(part: TablePhotos) -> TablePhotos:
            table = tables[part.index]
            photos = [
                dataclasses.replace(p, caption=p.caption and rename(p.caption), concept=p.concept and (table.concept or ""))
                for p in part.photos
            ]
            return TablePhotos(part.index, table, tuple(photos))

        return RunPhotos(tuple(map(changed, self.parts)), tuple(map(changed, self.held_out)))


def read_photos(config: RunOptions, share: float = 0.0, seed: int = 0, shards: Path | None = None) -> RunPhotos:
    """Reads the photos of all datasets of a run.

    Args:
        share: share of the photos of each dataset that is held out, by `seed`.
        shards: folder into which photos of tar files are written; without it, tar files are not read.
    Raises:
        DataError: a dataset without photos or with unreadable ones, or a share that leaves none to train on.
        OptionError: see `dataset_tables`.
    """
    several = bool(config.datasets)
    parts = []
    for index, table in enumerate(dataset_tables(config)):
        archives = shards_of(table.path) if shards else []
        photos = find_photos(
            extract_shards(archives, shards / f"{index:02d}") if archives and shards else table.path,
            is_prior=table.regularization,
            concept=None if several or not table.is_trained else table.concept,
            recursive=table.recursive,
            caption_extension=".txt" if archives else table.caption_extension,
        )
        if several and not table.regularization:
            photos = [dataclasses.replace(photo, concept=table.concept or "") for photo in photos]
        parts.append(TablePhotos(index, table, tuple(photos)))
    held_out = {photo.digest for part in parts if part.table.is_trained for photo in _held_out(part, share, seed)}
    rest = [_without(part, held_out) for part in parts if not part.table.validation]
    validation = [_only(part, held_out) for part in parts if part.table.is_trained]
    validation += [part for part in parts if part.table.validation]
    return RunPhotos(tuple(rest), tuple(part for part in validation if part.photos))


def _held_out(part: TablePhotos, share: float, seed: int) -> list[Photo]:
    """The photos that are held out: at least one and not all, if the share is above 0."""
    if not share:
        return []
    unique = list({photo.digest: photo for photo in part.photos}.values())
    count = max(1, round(share * len(unique)))
    if count >= len(unique):
        message = (
            f"validation_share: {share:g} of {len(unique)} photos in {part.table.path} leaves none to train on; expected a "
            "smaller share, or a folder of other photos as validation."
        )
        raise DataError(message, file=part.table.path, where="validation_share", given=share, expected=len(unique))
    return sorted(unique, key=lambda photo: mix(seed, "validation", photo.digest))[:count]


def _without(part: TablePhotos, digests: set[str]) -> TablePhotos:
    """The part without held-out photos, which another dataset may have too."""
    rest = tuple(photo for photo in part.photos if photo.digest not in digests)
    if not rest:
        message = f"{part.table.path}: all photos are held out by validation_share; expected photos that other datasets lack."
        raise DataError(message, file=part.table.path, where="validation_share", given=len(part.photos), expected=1)
    return dataclasses.replace(part, photos=rest)


def _only(part: TablePhotos, digests: set[str]) -> TablePhotos:
    return dataclasses.replace(part, photos=tuple(photo for photo in part.photos if photo.digest in digests))


def check_mentions(photos: RunPhotos) -> None:
    """Checks that a caption or template of every concept contains it.

    Raises:
        DataError: a concept that no caption has.
    """
    for token in dict.fromkeys(part.table.concept for part in photos.training if part.table.concept):
        parts = [part for part in photos.training if part.table.concept == token]
        if not any(_mentions(token, part) for part in parts):
            paths = tuple(str(part.table.path) for part in parts)
            message = (
                f"datasets: no caption of {', '.join(paths)} contains the concept {token!r}, so it is not learned; expected it "
                "in captions. Add it, such as caption_prefix = '{concept},', or remove the caption files."
            )
            raise DataError(message, file=parts[0].table.path, where="concept", given=paths, expected=token)


def _mentions(token: str, part: TablePhotos) -> bool:
    captions = part.table.captions()
    return any(mentions(token, text) for photo in part.photos for text in captions.longest(photo.caption))
