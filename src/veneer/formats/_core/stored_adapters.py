"""Adapters of native files without a model: their methods, sites and tensors, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.injection import LoadError
from veneer.injection.attachment.files import StoredAdapter

from .. import native
from .._io.reader import read
from .._io.writer import add_state
from .attach import build_method, migrate_config


@dataclass(frozen=True)
class StoredFile:
    """A native file.

    Args:
        path: of the file. `header`: its JSON header.
        states: for each attachment of the header, its tensors under `site-name:parameter`.
    """

    path: str
    header: Mapping[str, Any]
    states: tuple[Mapping[str, Tensor], ...]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Header entries of the attachments."""
        return list(self.header["attachments"])


def read_native(path: str | PathLike[str]) -> StoredFile:
    """Reads the header and all tensors of a native file.

    Raises:
        LoadError: the file is of another format or corrupt.
    """
    file = read(path)
    if native.KEY not in file.metadata:
        message = f"{file.path}: is not in veneer's format. Convert it with veneer convert --to native."
        raise LoadError(message, file=file.path, where="format", expected="native")
    header, tensors = native.header_of(file), file.tensors(finite=True, whole=("",))
    several = len(header["attachments"]) > 1
    prefixes = [f"{entry['name']}/" if several else "" for entry in header["attachments"]]
    states = [native.state_of_entry(file, e, tensors, p)[0] for e, p in zip(header["attachments"], prefixes, strict=True)]
    return StoredFile(str(file.path), header, tuple(states))


def write_native(
    path: Path, header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Tensor]]
) -> Path:
    """Writes attachments to a native file.

    Args:
        header: fields besides `attachments`. `entries`: header entries; `states`: their tensors, in the same order.
    Raises:
        SaveError: writing fails.
    """
    tensors: dict[str, Tensor] = {}
    complete = []
    for entry, state in zip(entries, states, strict=True):
        prefix = f"{entry['name']}/" if len(entries) > 1 else ""
        complete.append({**entry, "shared": add_state(state, tensors, prefix)})
    return native.write_header(path, tensors, {**header, "attachments": complete})


def method_of_entry(file: StoredFile, entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The config of a stored attachment.

    Raises:
        LoadError: its method is not installed, or does not have its options.
    """
    source: Any = file
    return build_method(entry["method"], migrate_config(source, entry, entry["config"], state.keys()))


def read_stored(path: str | PathLike[str]) -> tuple[StoredAdapter, ...]:
    """Reads the adapters of a native file.

    Raises:
        LoadError: the file is of another format or corrupt, or has a method that is not installed.
    """
    stored, adapters = read_native(path), []
    for entry, state in zip(stored.entries, stored.states, strict=True):
        method = method_of_entry(stored, entry, state)
        adapters.append(StoredAdapter(stored.path, method, tuple(entry["sites"]), state, stored.header["base"]))
    return tuple(adapters)
