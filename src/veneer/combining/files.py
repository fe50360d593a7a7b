"""Adapters of files, and a LoRA into a new file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..formats import formats, load_all, look
from ..injection import Attachment, LoadError, SaveError
from .changes import CombineError
from .making import Outcome

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_one(model: Any, path: str | PathLike[str]) -> Attachment:
    """The only adapter of a file, on the model.

    Raises:
        LoadError: it does not fit. CombineError: the file holds several, such as learned words beside a LoRA.
    """
    found = load_all(model, path)
    if len(found) == 1:
        return found[0]
    for attachment in reversed(found):
        attachment.detach()
    told = ", ".join(f"{a.name} ({a.method.name})" for a in found)
    raise CombineError(
        f"{path}: holds {told}; only a single adapter can be taken. `veneer convert` puts words into another file."
    )


def free(path: str | PathLike[str], form: str) -> Path:
    """Where a file of a format will be.

    Raises:
        SaveError: something is there already.
    """
    target = formats.get(form)().place(path)
    if target.exists():
        raise SaveError(f"{target}: it is there already. Give another --out.")
    return target


def form_of(path: str | PathLike[str]) -> str:
    """The format of a file.

    Raises:
        LoadError: none that is known.
    """
    found = look(path).format
    if found is None:
        raise LoadError(f"{path}: no known format. Give --to.")
    return found


def write(
    outcome: Outcome, path: str | PathLike[str], form: str, dtype: torch.dtype, provenance: Mapping[str, Any] | None = None
) -> Path:
    """The LoRA of an outcome as a new file in `dtype`, to which its matrices are rounded already.

    Raises:
        SaveError: the format cannot hold it, or the file is there.
    """
    target = free(path, form)
    for parameter in outcome.attachment.parameters():
        narrow = parameter.data.to(dtype)
        parameter.data = narrow if torch.equal(narrow.to(parameter.dtype), parameter) else parameter.data
    return formats.get(form)().save(outcome.attachment, target, provenance)
