"""What a file format is: a name, which files are its own, and how attachments come out of them and go into them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, LoadError
from veneer.injection.registry import Registry

from .._io.reader import File
from .._io.writer import destination


@dataclass(frozen=True)
class Options:
    """How a file is loaded.

    Args:
        name: of the attachment; None for the saved one.
        strict: a tensor that is missing, unused, misshapen or not finite is an error.
        same_base: another base than the one it was trained on is an error.
        token: for embeddings, the token in prompts; None for the saved one.
        into: a list that takes what would be attached, in the place of attaching it.
    """

    name: str | None = None
    strict: bool = True
    same_base: bool = True
    token: str | None = None
    into: list[Any] | None = None


@dataclass(frozen=True)
class Layer:
    """One change that a file makes, as far as the file itself tells.

    Args:
        name: as in the file, without what tells its tensors apart.
        method: such as `lora`. `rank`, `alpha`: None where it has none, or where the file does not say.
        values: numbers that are stored for it.
    """

    name: str
    method: str
    rank: int | None = None
    alpha: float | None = None
    values: int = 0


class Format(ABC):
    """One file format. The file is the registration: stem == `name`; other packages use the entry point `veneer.formats`.

    Class attributes:
        file: usual file name, used where a folder is given.
        folder: True if it is written as a folder of files. `beside`: names of files that may be written beside the usual one.
        order: formats are asked in this order whether a file is theirs; those with a plain mark in the file come first.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    order: ClassVar[int] = 1
    folder: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ()

    def place(self, path: str | PathLike[str]) -> Path:
        """The file, or the folder, that a path means."""
        return destination(path, self.file)

    @abstractmethod
    def reads(self, file: File) -> bool:
        """True if `file` is of this format, by its metadata and the names and shapes of its tensors."""

    def layers(self, file: File) -> list[Layer]:
        """What is in `file`, without a model; nothing where a format does not tell.

        Raises:
            LoadError: the header is damaged.
        """
        return []

    def words(self, file: File) -> list[str]:
        """Words for prompts that came with the training: learned ones, or the phrase that the header names.

        Raises:
            LoadError: the header is damaged.
        """
        phrase = file.metadata.get("modelspec.trigger_phrase", "").strip()
        return [phrase] if phrase else []

    @abstractmethod
    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        """Attach what is in `file` to `model`, all or nothing.

        Raises:
            LoadError: with a report of what does not fit.
        """

    @abstractmethod
    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write attachments to one file and give its path.

        Raises:
            SaveError: the format cannot hold them, or the file cannot be written; what was there before stays.
        """


formats: Registry[Format] = Registry(Format, "veneer.formats", "veneer.formats")


def format_of(file: File) -> Format | None:
    """The format that reads `file`, or None."""
    every = sorted((formats.get(name)() for name in formats.names()), key=lambda f: (f.order, f.name))
    return next((f for f in every if f.reads(file)), None)


def known_format(file: File) -> Format:
    """The format that reads `file`.

    Raises:
        LoadError: there is none.
    """
    known = format_of(file)
    if known is None:
        raise LoadError(
            f"{file.path}: no known format; tensors: {len(file.shapes)}, {', '.join(list(file.shapes)[:3])}. "
            f"It reads: {', '.join(formats.names())}. Weights of a whole model are loaded with their own library.",
            file=file.path,
            given=tuple(file.shapes),
            expected=tuple(formats.names()),
        )
    return known


def values(file: File, keys: Iterable[str]) -> int:
    """Number of elements of the tensors under these keys."""
    return sum(math.prod(file.shapes[key]) for key in keys)


def sizes(file: File, mark: str) -> dict[str, int]:
    """Number of stored elements by the part of each key before the last `mark`."""
    found: dict[str, int] = {}
    for key, shape in file.shapes.items():
        name = key.rpartition(mark)[0]
        found[name] = found.get(name, 0) + math.prod(shape)
    return found


def listed(attachments: Attachment | Sequence[Attachment]) -> list[Attachment]:
    """One attachment or several as a list."""
    return [attachments] if isinstance(attachments, Attachment) else list(attachments)
