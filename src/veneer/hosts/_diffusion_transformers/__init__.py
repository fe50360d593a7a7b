"""Diffusion transformers of diffusers as records: one module per family, for images and for video."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from .record import TransformerRecord


@functools.cache
def records() -> dict[str, TransformerRecord]:
    """The record of every family, by the name of its module. Imports no library of models."""
    stems = {}
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        if info.name.count(".") > __name__.count(".") + 1 and not info.ispkg:
            stems[info.name.rpartition(".")[2]] = info.name
    return {stem: importlib.import_module(stems[stem]).RECORD for stem in sorted(stems)}
