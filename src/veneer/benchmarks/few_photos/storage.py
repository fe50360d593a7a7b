"""Cached arrays on disk, each with the recipe (settings) it was computed from; a changed recipe invalidates it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from veneer.atomic_files import write_atomically


def cached(path: Path, recipe: Mapping[str, Any], make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The array in `path` if its recipe is the same, else the result of `make()`, which is written there.

    Args:
        path: an `.npz`. `recipe`: JSON values.
    """
    text = json.dumps(recipe, sort_keys=True)
    found = _read(path, text)
    if found is None:
        found, data = make(), io.BytesIO()
        np.savez_compressed(data, values=found, recipe=np.array(text))
        write_atomically(path, data.getvalue())
    return found


def _read(path: Path, recipe: str) -> npt.NDArray[Any] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["values"] if str(file["recipe"]) == recipe else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
