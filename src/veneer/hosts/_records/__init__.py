"""Records of model families, shared by the hosts of diffusers and transformers: one module with a `RECORD` per family."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any


@functools.cache
def load_records(package: str) -> dict[str, Any]:
    """The `RECORD` of each module in the sub-packages of a package, by the module's name. Imports no library of models."""
    folders = importlib.import_module(package).__path__
    stems = {}
    for info in pkgutil.walk_packages(folders, f"{package}."):
        if info.name.count(".") > package.count(".") + 1 and not info.ispkg:
            stems[info.name.rpartition(".")[2]] = info.name
    return {stem: importlib.import_module(stems[stem]).RECORD for stem in sorted(stems)}
