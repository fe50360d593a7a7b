"""Adapter file formats, one module each. `load` and `load_all` recognize a format by the content of a file."""

from __future__ import annotations

import logging
from os import PathLike
from typing import Any, Literal

from veneer.injection import Attachment
from veneer.injection.attachment.files import FileFunctions, register_file_functions
from veneer.injection.errors import LoadError, OptionError
from veneer.injection.towers import cache_towers

from ._core import families
from ._core.conversion import ConversionResult, convert
from ._core.format import Format, LayerInfo, Options, format_of, formats, known_format
from ._core.inspection import FileSummary, inspect
from ._core.stored_adapters import read_stored
from ._core.swap import swap_file
from ._io.locations import DEFAULT_NAMES as DEFAULT_NAMES
from ._io.locations import local_path
from ._io.reader import File, read
from .native import save

_log = logging.getLogger(__name__)

register_file_functions(FileFunctions(save=save, swap=swap_file, read=read_stored))

__all__ = [
    "ConversionResult",
    "File",
    "FileSummary",
    "Format",
    "LayerInfo",
    "Options",
    "architecture_of",
    "convert",
    "format_of",
    "formats",
    "inspect",
    "load",
    "load_all",
    "local_path",
    "read",
]


def architecture_of(path: str | PathLike[str]) -> str | None:
    """Name of the architecture whose layers an adapter file has, one of `veneer.base_models.ARCHITECTURES`; None if unknown.

    Raises:
        LoadError: it is not a complete safetensors file.
    """
    file = read(path)
    known = format_of(file)
    return families.architecture_of(file.shapes, known.name if known else None, file.metadata.get("modelspec.architecture", ""))


def load(
    model: Any,
    path: str | PathLike[str],
    *,
    name: str | None = None,
    scale: float = 1.0,
    strict: bool = True,
    base: Literal["same", "any"] = "same",
    token: str | None = None,
) -> Attachment:
    """Attaches a saved adapter to a model or a pipeline. Its outputs equal those at the time of saving, or an error is raised.

    Args:
        model: a module or a pipeline, as for `attach`: the base model that the adapter was trained on.
        path: a safetensors file of any supported format, with or without its suffix; a folder with `adapter.safetensors` or as
            peft or diffusers writes it; an image that contains a token embedding; or, if there is no such path, a name on the
            hub: `user/repo`, `user/repo/file.safetensors`, each also with `@revision`.
        name: name of the attachment (default: the saved name).
        scale: strength; 1 is the strength of training.
        strict: False loads the matching tensors of a file with missing, unused or misshapen tensors. `Attachment.loaded` lists
            what was loaded, and a logged warning lists the rest.
        base: `same` rejects a base model other than the recorded one, if the file records it; `any` skips the comparison.
        token: for embeddings, the trigger token in prompts, which replaces the token in the file.
    Returns:
        The attachment. Use `load_all` for a file with several, such as a LoRA and a token embedding.
    Raises:
        LoadError: the file does not match the model or has several attachments; nothing is attached then.
        HubError: a name on the hub without such a file, or an unreachable hub.
    """
    loaded = load_all(model, path, name=name, scale=scale, strict=strict, base=base, token=token)
    if len(loaded) == 1:
        return loaded[0]
    names = tuple(attachment.name for attachment in loaded)
    for attachment in reversed(loaded):
        attachment.detach()
    content = f"{len(names)} attachments ({', '.join(names)})" if names else "no attachment for this model"
    message = f"load: {path} has {content}; expected one. Use veneer.load_all, which returns a list of all attachments of a file."
    raise LoadError(message, file=path, where="attachments", given=names, expected=1)


def load_all(
    model: Any,
    path: str | PathLike[str],
    *,
    name: str | None = None,
    scale: float = 1.0,
    strict: bool = True,
    base: Literal["same", "any"] = "same",
    token: str | None = None,
    heads: bool = True,
) -> list[Attachment]:
    """Attaches everything in a saved file to a model or a pipeline. All or nothing.

    Args:
        model, path, scale, strict, base, token: as for `load`.
        name: name of the attachment; of several, the first part of their names (default: the saved names).
        heads: also load the head of a classifier; without it, adapters of a run with other classes fit.
    Returns:
        The attachments, in the order of the file. They run in the file's composition, if it has one.
    Raises:
        LoadError: the file does not match the model; nothing is attached then.
    """
    if base not in ("same", "any"):
        raise OptionError.of("load", "base", base, "'same' or 'any'")
    file = read(path)
    with cache_towers():
        options = Options(name=name, strict=strict, same_base=base == "same", token=token, heads=heads)
        found = known_format(file).load(model, file, options)
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
    """Logs a warning that lists what `strict=False` did not load of a file."""
    reports = [a.loaded for a in attachments]
    for word in ("unused", "missing", "misshapen"):
        names = [name for report in reports for name in getattr(report, word)]
        if names:
            _log.warning("%s: strict=False: %d tensors %s: %s", path, len(names), word, ", ".join(names[:8]))
