"""Functions that save an attachment to a file, load one into it, and read one. `veneer.formats` registers them on import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.discovery import FILE_FORMATS

from ..method import Method
from .state_dict import LoadReport


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter of a file, without a model.

    Args:
        file: path of the file. `method`: the config. `sites`: their names. `tensors`: under `site-name:parameter`.
        base: identity of each adapted component: `class`, `config`, `fingerprint`, and `without`, the tensors that it leaves out.
    """

    file: str
    method: Method
    sites: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class FileFunctions:
    """Implementations of methods of `Attachment`.

    Args:
        save: of `Attachment.save`, (attachment, path) to the path that was written.
        swap: of `Attachment.swap`, (attachment, path, base=…) to the report.
        read: the adapters of a native file, for methods that are trained on top of others; raises `LoadError`.
    """

    save: Callable[[Any, Any], Path]
    swap: Callable[..., LoadReport]
    read: Callable[[Any], tuple[StoredAdapter, ...]]


_registered: list[FileFunctions] = []


def register_file_functions(functions: FileFunctions) -> None:
    """Uses these functions in `Attachment.save` and `Attachment.swap`."""
    _registered[:] = [functions]


def file_functions() -> FileFunctions:
    """The registered functions. Imports the package of file formats on first use."""
    if not _registered:
        importlib.import_module(FILE_FORMATS)
    return _registered[0]
