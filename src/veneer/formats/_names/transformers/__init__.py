"""File names of the modules of diffusion transformers: one module per family, each a table."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from torch import nn

from .record import TransformerNames


@functools.cache
def records() -> dict[str, TransformerNames]:
    """The table of every family, by the name of its module."""
    stems = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "record")
    return {stem: importlib.import_module(f"{__name__}.{stem}").RECORD for stem in stems}


def names_of(model: nn.Module) -> TransformerNames | None:
    """The table of a model's family, or None."""
    kind = type(model).__name__
    return next((record for record in records().values() if kind in record.classes), None)
