"""File formats: one file each, found by its name. `load` is the one door; it recognises a format by what is in the file."""

from __future__ import annotations

import logging
from os import PathLike
from typing import Any, Literal

from veneer.injection import Attachment
from veneer.injection.errors import OptionError
from veneer.injection.towers import kept

from ._core.conversion import Converted, convert
from ._core.format import Format, Layer, Options, format_of, formats, known_format
from ._core.inspection import Look, look
from ._io.reader import File, read

_log = logging.getLogger(__name__)

__all__ = [
    "Converted",
    "File",
    "Format",
    "Layer",
    "Look",
    "Options",
    "convert",
    "format_of",
    "formats",
    "load",
    "load_all",
    "look",
    "read",
]


def load(
    model: Any,
    path: str | PathLike[str],
    *,
    name: str | None = None,
    scale: float = 1.0,
    strict: bool = True,
    base: Literal["same", "any"] = "same",
    token: str | None = None,
) -> Any:
    """Put a saved adapter on a model or a pipeline: the same outputs as when it was saved, or an error. All or nothing.

    Args:
        model: as for `attach`: the base that the adapter was trained on.
        path: a safetensors file of any known format, without its suffix if you like, a folder with `adapter.safetensors` or as
            peft or diffusers writes it, or a picture with a learned word in it.
        name: of the attachment; the saved one by default. Of several in one file, the first part of their names.
        scale: strength, 1 as trained.
        strict: False loads what fits of a file with missing, unused or misshapen tensors; `Attachment.loaded` says what did, and
            a logged warning what did not.
        base: `same` refuses another base than the adapter was trained on, where the file says which; `any` does not look.
        token: for embeddings, the word in prompts, in the place of the one in the file.
    Returns:
        The attachment, or a list of them where the file holds several (`load_all` always gives a list).
    Raises:
        LoadError: with a report of what does not fit; nothing is attached then.
    """
    found = load_all(model, path, name=name, scale=scale, strict=strict, base=base, token=token)
    return found[0] if len(found) == 1 else found


def load_all(
    model: Any,
    path: str | PathLike[str],
    *,
    name: str | None = None,
    scale: float = 1.0,
    strict: bool = True,
    base: Literal["same", "any"] = "same",
    token: str | None = None,
) -> list[Attachment]:
    """`load`, with a list also where the file holds one attachment."""
    if base not in ("same", "any"):
        raise OptionError.of("load", "base", base, "'same' or 'any'")
    file = read(path)
    with kept():
        found = known_format(file).load(model, file, Options(name=name, strict=strict, same_base=base == "same", token=token))
    _log_left_out(path, found)
    try:
        for attachment in found:
            if scale != attachment.scale:
                attachment.scale = scale
    except BaseException:
        for attachment in reversed(found):
            attachment.detach()
        raise
    return found


def _log_left_out(path: str | PathLike[str], attachments: list[Attachment]) -> None:
    """Log a warning that names what `strict=False` did not load of a file."""
    reports = [a.loaded for a in attachments]
    for word in ("unused", "missing", "misshapen"):
        names = [name for report in reports for name in getattr(report, word)]
        if names:
            _log.warning("%s: strict=False: %d tensors %s: %s", path, len(names), word, ", ".join(names[:8]))
