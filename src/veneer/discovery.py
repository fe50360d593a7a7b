"""Discovery of registry entries: modules of a package and entry points of other distributions, without importing them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

FILE_FORMATS = "veneer.formats"
"""The package that registers how attachments are saved to files and loaded from them, when it is imported."""


@dataclass(frozen=True)
class Entry:
    """Origin of a name: a module of this package, or an entry point of another distribution.

    Args:
        source: name of the distribution.
    """

    name: str
    source: str
    module: str | None = None
    point: EntryPoint | None = None


def find_entries(package: str, group: str) -> Iterator[Entry]:
    """Every module of a package, and every entry point of a group.

    Args:
        package: searched recursively; modules and sub-packages that start with `_` are skipped.
        group: name of the entry-point group.
    """
    for module in _modules(package):
        yield Entry(module.rpartition(".")[2], "veneer", module=module)
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        yield Entry(point.name, point.dist.name if point.dist else point.value, point=point)


def _modules(package: str) -> Iterator[str]:
    """Names of the modules below a package. Imports its sub-packages, except those that start with `_`."""
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("_"):
            continue
        name = f"{package}.{info.name}"
        yield from _modules(name) if info.ispkg else (name,)
