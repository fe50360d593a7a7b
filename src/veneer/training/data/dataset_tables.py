"""Tables of datasets: their options, defaults and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer.config_file import entries_of
from veneer.flags import values
from veneer.injection.errors import OptionError

from .buckets import Crop
from .captions import Captions


@dataclass(frozen=True)
class DatasetTable:
    """One dataset of a run. None stands for the option of the run with the same name.

    Args:
        path: folder with photos, one photo, or a tar file with photos and captions.
        concept: trigger token of the dataset. `""`: photos with captions that have no concept.
        class_word: ordinary word for the subject.
        repeats: how often each photo occurs in an epoch.
        regularization: the photos are class images of `class_word`, with the weight `prior_loss_weight`.
        validation: the photos are held out, and the loss on them is measured.
        recursive: also read subfolders.
        caption_extension: ending of caption files.
        caption_prefix, caption_suffix, keep_tokens_separator, secondary_separator: see `Captions`.
        template, caption_dropout, tag_dropout, keep_tokens, shuffle_tags, crop, flip, buckets, masks: as for the run.
        resolution: one or several: an epoch has each photo at each of them.
        upscale, min_side, max_side: see `BucketPlan`.
    """

    path: Path = Path()
    concept: str | None = None
    class_word: str | None = None
    repeats: int = 1
    regularization: bool = False
    validation: bool = False
    recursive: bool = False
    caption_extension: str = ".txt"
    caption_prefix: str = ""
    caption_suffix: str = ""
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    template: tuple[str, ...] | None = None
    caption_dropout: float | None = None
    tag_dropout: float | None = None
    keep_tokens: int | None = None
    shuffle_tags: bool | None = None
    resolution: tuple[int, ...] | None = None
    crop: Crop | None = None
    flip: float | None = None
    buckets: bool | None = None
    masks: bool | None = None
    upscale: bool = True
    min_side: int | None = None
    max_side: int | None = None

    @property
    def is_trained(self) -> bool:
        """Whether its photos are of a subject that is trained."""
        return not self.regularization and not self.validation

    def captions(self) -> Captions:
        """Captions of its samples; all options are resolved."""
        templates = self.template or ("{concept}",)
        word = self.class_word or ""
        has_prior = word or (self.regularization and "{concept}" not in templates[0])
        return Captions(
            concept=self.concept or "",
            prior=templates[0].replace("{concept}", word) if has_prior else "",
            templates=templates,
            dropout=self.caption_dropout or 0.0,
            tag_dropout=self.tag_dropout or 0.0,
            shuffle=bool(self.shuffle_tags),
            keep_tokens=self.keep_tokens or 0,
            prefix=self.caption_prefix,
            suffix=self.caption_suffix,
            keep_separator=self.keep_tokens_separator,
            secondary_separator=self.secondary_separator,
        )


INHERITED = (
    "template", "caption_dropout", "tag_dropout", "keep_tokens", "shuffle_tags", "crop", "flip", "buckets", "masks",
)  # fmt: skip
"""Options that a table takes from the run."""


class RunOptions(Protocol):
    """The options of a run that its tables inherit; see `PersonalizeConfig`."""

    @property
    def photos(self) -> Path | None: ...
    @property
    def datasets(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def concept(self) -> str: ...
    @property
    def class_word(self) -> str: ...
    @property
    def resolution(self) -> int | None: ...
    @property
    def validation(self) -> Path | None: ...


def dataset_tables(config: RunOptions) -> tuple[DatasetTable, ...]:
    """The datasets of a run with resolved options, and its validation photos at the end; without datasets, its photos are one.

    Raises:
        OptionError: `photos` and datasets, an unknown or invalid option, no path, no concept, or two class words of a concept.
    """
    held_out = [DatasetTable(config.validation, validation=True, recursive=True)] if config.validation else []
    if not config.datasets:
        return tuple(_resolve(table, config, {}) for table in (DatasetTable(config.photos or Path()), *held_out))
    if config.photos is not None:
        message = f"datasets: photos is {config.photos} as well; expected one of the two. Add a dataset with that path."
        raise OptionError(message, option="datasets", where="photos", given=str(config.photos), expected=None)
    tables = [parse_table(content, f"datasets[{i}]") for i, content in enumerate(config.datasets)]
    subjects = [table for table in tables if table.is_trained]
    if not subjects:
        message = "datasets: all of them are class images or held out; expected one with photos of the subject."
        raise OptionError(message, option="datasets", where="datasets", given=len(tables), expected="a subject")
    default = config.concept or next((table.concept for table in subjects if table.concept), "")
    tables = [dataclasses.replace(t, concept=default if t.concept is None else t.concept) for t in (*tables, *held_out)]
    _check_concepts(tables, config)
    words = _class_words(tables, config)
    return tuple(_resolve(table, config, words) for table in tables)


def _check_concepts(tables: Sequence[DatasetTable], config: RunOptions) -> None:
    known = {table.concept for table in tables if table.is_trained and table.concept}
    if not known:
        message = "datasets: none has a concept; expected a trigger token, such as concept = '<toy>'."
        raise OptionError(message, option="datasets", where="datasets[0].concept", given="", expected="a token")
    for i, table in enumerate(tables):
        if table.validation and table.concept and table.concept not in known:
            message = (
                f"datasets[{i}]: held-out photos of {table.concept}; expected a trained concept, {', '.join(sorted(known))}."
            )
            where = f"datasets[{i}].concept"
            raise OptionError(message, option="datasets", where=where, given=table.concept, expected=tuple(sorted(known)))


def parse_table(content: Mapping[str, Any], where: str) -> DatasetTable:
    """A table of a config file or flag.

    Args:
        where: its position for errors, such as `datasets[0]`.
    Raises:
        OptionError: an unknown option, a value of another type, no path, or a value out of range.
    """
    table = {str(key).replace("-", "_"): value for key, value in content.items()}
    result = DatasetTable(**values(DatasetTable, entries_of(table, DatasetTable, place=f"{where}.")))
    if "path" not in table:
        message = f"{where}: no path; expected the folder of its photos."
        raise OptionError(message, option="datasets", where=f"{where}.path", given=None, expected="a path")
    if result.regularization and result.validation:
        message = f"{where}: regularization and validation; expected one of the two."
        raise OptionError(message, option="datasets", where=f"{where}.validation", given=True, expected=False)
    for name, low, high in (("repeats", 1, None), ("flip", 0, 1), ("caption_dropout", 0, 1), ("tag_dropout", 0, 1)):
        given = getattr(result, name)
        if given is not None and not (given >= low and (high is None or given <= high)):
            expected = f"at least {low}" if high is None else f"{low} to {high}"
            message = f"{where}: {name} is {given}; expected {expected}."
            raise OptionError(message, option="datasets", where=f"{where}.{name}", given=given, expected=expected)
    return result


def _class_words(tables: Sequence[DatasetTable], config: RunOptions) -> dict[str, str]:
    """Concept to its class word.

    Raises:
        OptionError: two tables have other class words for one concept.
    """
    words: dict[str, str] = {config.concept: config.class_word} if config.concept and config.class_word else {}
    for i, table in enumerate(tables):
        if not table.concept or not table.class_word or table.regularization:
            continue
        known = words.setdefault(table.concept, table.class_word)
        if known != table.class_word:
            message = (
                f"datasets[{i}]: the class word of {table.concept} is {table.class_word!r}, and {known!r} before; expected one "
                "class word per concept. Use another concept, or the same class word."
            )
            where = f"datasets[{i}].class_word"
            raise OptionError(message, option="datasets", where=where, given=table.class_word, expected=known)
    return words


def _resolve(table: DatasetTable, config: RunOptions, words: Mapping[str, str]) -> DatasetTable:
    concept = config.concept if table.concept is None else table.concept
    options: dict[str, Any] = {name: getattr(config, name) for name in INHERITED if getattr(table, name) is None}
    word = words.get(concept, "") if table.class_word is None else table.class_word
    if not word and concept == config.concept:
        word = config.class_word
    resolution = table.resolution or ((config.resolution,) if config.resolution else None)
    return dataclasses.replace(table, concept=concept, class_word=word, resolution=resolution, **options)
