"""Adapters of a native file without a model: their methods, sites and tensors."""

from __future__ import annotations

from os import PathLike

from veneer.injection import LoadError
from veneer.injection.attachment.files import StoredAdapter

from .. import native
from .._io.reader import read
from .attach import build_method, migrate_config


def read_stored(path: str | PathLike[str]) -> tuple[StoredAdapter, ...]:
    """Reads the adapters of a native file.

    Raises:
        LoadError: the file is of another format or corrupt, or has a method that is not installed.
    """
    file = read(path)
    if native.KEY not in file.metadata:
        message = f"{file.path}: is not in veneer's format. Convert it with veneer convert --to native."
        raise LoadError(message, file=file.path, where="format", expected="native")
    header, tensors = native.header_of(file), file.tensors(finite=True, whole=("",))
    several = len(header["attachments"]) > 1
    adapters = []
    for entry in header["attachments"]:
        state, _ = native.state_of_entry(file, entry, tensors, f"{entry['name']}/" if several else "")
        method = build_method(entry["method"], migrate_config(file, entry, entry["config"], tensors.keys()))
        adapters.append(StoredAdapter(str(file.path), method, tuple(entry["sites"]), state, header["base"]))
    return tuple(adapters)
