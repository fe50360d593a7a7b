"""Functions that save an attachment to a file and load one into it. `veneer.formats` registers them when it is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.discovery import FILE_FORMATS

from .state_dict import LoadReport


@dataclass(frozen=True)
class FileFunctions:
    """Implementations of methods of `Attachment`.

    Args:
        save: of `Attachment.save`, (attachment, path) to the path that was written.
        swap: of `Attachment.swap`, (attachment, path, base=…) to the report.
    """

    save: Callable[[Any, Any], Path]
    swap: Callable[..., LoadReport]


_registered: list[FileFunctions] = []


def register_file_functions(functions: FileFunctions) -> None:
    """Uses these functions in `Attachment.save` and `Attachment.swap`."""
    _registered[:] = [functions]


def file_functions() -> FileFunctions:
    """The registered functions. Imports the package of file formats on first use."""
    if not _registered:
        importlib.import_module(FILE_FORMATS)
    return _registered[0]
