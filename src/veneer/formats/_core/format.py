"""The contract of a file format: its name, the files it recognizes, and how it loads and saves attachments."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.composition.compose import compositions_of
from veneer.injection.registry import Registry

from .._io.reader import SUFFIX, File
from .._io.writer import destination


@dataclass(frozen=True)
class Options:
    """Options for loading a file.

    Args:
        name: of the attachment; None means the saved one.
        strict: missing, unused, misshapen and non-finite tensors are errors.
        same_base: a base other than the one the adapter was trained on is an error.
        token: trigger token of an embedding; None means the saved one.
        into: a list that collects the specifications of attachments instead of attaching them.
        assign: tensors of the file become the adapters' parameters, in their dtype and without a copy; not to be trained.
        heads: also load attachments that only replace the classifier's head.
    """

    name: str | None = None
    strict: bool = True
    same_base: bool = True
    token: str | None = None
    into: list[Any] | None = None
    assign: bool = False
    heads: bool = True


@dataclass(frozen=True)
class LayerInfo:
    """One adapted layer of a file, as far as the file itself describes it.

    Args:
        name: as in the file, without the suffix of its tensors.
        method: such as `lora`. `rank`, `alpha`: None if it has none, or if the file does not state it.
        values: number of stored parameters.
    """

    name: str
    method: str
    rank: int | None = None
    alpha: float | None = None
    values: int = 0


class Format(ABC):
    """One file format. The file is the registration: stem == `name`; other packages use the entry point `veneer.formats`.

    Class attributes:
        file: default file name, used if a folder is given.
        folder: True if it is written as a folder of files. `beside`: names of additional files that may be written next to it.
        order: formats are tried in this order; those that files identify unambiguously come first.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    order: ClassVar[int] = 1
    folder: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ()

    def place(self, path: str | PathLike[str]) -> Path:
        """The file or folder that a path refers to."""
        if not self.folder:
            return destination(path, self.file)
        return Path(path).with_suffix("") if Path(path).suffix == SUFFIX else Path(path)

    @abstractmethod
    def reads(self, file: File) -> bool:
        """True if `file` is of this format, by its metadata and the names and shapes of its tensors."""

    def layers(self, file: File) -> list[LayerInfo]:
        """Layers in `file`, without a model; empty if the format does not describe them.

        Raises:
            LoadError: the header is corrupt.
        """
        return []

    def words(self, file: File) -> list[str]:
        """Trigger tokens of the adapter: its token embeddings, or the trigger phrase in the metadata.

        Raises:
            LoadError: the header is corrupt.
        """
        phrase = file.metadata.get("modelspec.trigger_phrase", "").strip()
        return [phrase] if phrase else []

    @abstractmethod
    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        """Attaches the adapters in `file` to `model`, all or nothing.

        Raises:
            LoadError: with a report of missing, unused and misshapen tensors.
        """

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes one or several attachments and returns the path of the file.

        Args:
            path: file or folder; its suffix is optional. `provenance`: stored in the metadata, if the format has a place for it.
        Raises:
            SaveError: the format cannot hold them, or the file cannot be written; an existing file stays unchanged.
        """
        several = [attachments] if isinstance(attachments, Attachment) else list(attachments)
        if len(several) > 1 and self.name != "native":
            self._reject_nodes(several, self.place(path))
        return self.write_to(several, self.place(path), provenance)

    def _reject_nodes(self, attachments: Sequence[Attachment], target: Path) -> None:
        """Raises `SaveError` for attachments that run in an `Average` or a `Parallel`, which only native files have."""
        node = next((c.node for c in compositions_of(attachments) if c.is_routed), None)
        if node is not None:
            message = f"{target}: {node!r} can only be saved in the native format. Save each attachment alone, or call undo()."
            raise SaveError(message, file=target, where="composition", given=self.name, expected="native")

    @abstractmethod
    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        """Implements `save` for the file or folder `target`."""


formats: Registry[Format] = Registry(Format, "veneer.formats", "veneer.formats")


def format_of(file: File) -> Format | None:
    """The format that reads `file`, or None."""
    every = sorted((formats.get(name)() for name in formats.names()), key=lambda f: (f.order, f.name))
    return next((f for f in every if f.reads(file)), None)


def known_format(file: File) -> Format:
    """The format that reads `file`.

    Raises:
        LoadError: no format recognizes it.
    """
    known = format_of(file)
    if known is None:
        raise LoadError(
            f"{file.path}: unknown format; {len(file.shapes)} tensors: {', '.join(list(file.shapes)[:3])}. "
            f"Supported formats: {', '.join(formats.names())}. Load the weights of a whole model with its own library.",
            file=file.path,
            given=tuple(file.shapes),
            expected=tuple(formats.names()),
        )
    return known


def count_parameters(file: File, keys: Iterable[str]) -> int:
    """Number of parameters in the tensors under the given keys."""
    return sum(math.prod(file.shapes[key]) for key in keys)


def parameters_by_prefix(file: File, mark: str) -> dict[str, int]:
    """Number of stored parameters by the part of each key before the last `mark`."""
    found: dict[str, int] = {}
    for key, shape in file.shapes.items():
        name = key.rpartition(mark)[0]
        found[name] = found.get(name, 0) + math.prod(shape)
    return found


def pt_metadata(provenance: Mapping[str, Any] | None, entries: Mapping[str, str] | None = None) -> dict[str, str]:
    """Metadata of a file: the PyTorch marker, further entries, and the provenance as JSON."""
    found = {"format": "pt", **(entries or {})}
    return found | ({"provenance": json.dumps(dict(provenance))} if provenance else {})
