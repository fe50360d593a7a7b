"""Loads a file into an existing attachment."""

from __future__ import annotations

import dataclasses
from os import PathLike
from types import SimpleNamespace
from typing import Any, Literal

from veneer.injection import Attachment, LoadError, VeneerError
from veneer.injection.attachment.state_dict import LoadReport
from veneer.injection.composition.swap import refuse_merged, swap_state
from veneer.injection.errors import OptionError

from .._io.reader import File, read
from .attach import AttachmentSpec, build_method
from .format import Options, known_format


def swap_file(attachment: Attachment, path: str | PathLike[str], *, base: Literal["same", "any"] = "same") -> LoadReport:
    """Implements `Attachment.swap`."""
    if base not in ("same", "any"):
        raise OptionError.of("swap", "base", base, "'same' or 'any'")
    refuse_merged(attachment)
    file = read(path)
    each = _single_spec(attachment, file, base == "same")
    try:
        report = swap_state(attachment, build_method(each.method, each.config), each.sites, each.state)
    except LoadError as error:
        raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
    attachment.loaded = dataclasses.replace(report, notes=tuple(each.notes))
    attachment.provenance = dict(each.provenance)
    return attachment.loaded


def _single_spec(attachment: Attachment, file: File, same_base: bool) -> AttachmentSpec:
    """The single attachment of a file, read for the towers of `attachment`."""
    towers: Any = attachment.towers
    model = towers[""] if "" in towers else SimpleNamespace(components=towers)
    found: list[AttachmentSpec] = []
    try:
        made = known_format(file).load(model, file, Options(same_base=same_base, into=found))
    except VeneerError as error:
        names = ", ".join(component or type(tower).__name__ for component, tower in towers.items())
        message = f"{error} ('{attachment.name}' is on {names}.)"
        here = tuple(component or type(tower).__name__ for component, tower in towers.items())
        raise LoadError.from_error(error, message, file=file.path, where=attachment.name, given=here) from error
    for each in reversed(made):
        each.detach()
    if len(found) > 1:  # beside a head, or adapters that it was trained on top of
        found = [each for each in found if each.method == attachment.method.name] or found
    if made or len(found) != 1:
        what = ", ".join(each.method for each in found) or "of a format that cannot be swapped"
        raise LoadError(
            f"{file.path}: holds {len(found)} attachments ({what}); '{attachment.name}' takes one. Use veneer.load.",
            file=file.path,
            where=attachment.name,
            given=tuple(each.method for each in found),
            expected=1,
        )
    return found[0]
