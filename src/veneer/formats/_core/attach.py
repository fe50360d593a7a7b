"""From what a file says to attachments on a model: all of them or none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, Method, SaveError, VeneerError, attach, attachments, methods
from veneer.injection.attachment.deferred_init import claiming, filling
from veneer.injection.attachment.model_state import peek
from veneer.injection.errors import UnknownOption

from .._io.header import twice
from .._io.reader import File
from .format import Options
from .options import refuse_options


@dataclass(frozen=True)
class Wanted:
    """One attachment to make.

    Args:
        name: of the attachment. `config`: of the method called `method`.
        sites: names of the sites that get an adapter. `train`: names of the sites whose parameters are replaced.
        state: tensors, as `Attachment.load_state_dict` takes them.
        where, trained: the selections that were given when it was made, to be saved again; None for the names.
        notes: remarks for the report. `unused`: keys of the file that the model has no place for, for the report.
        provenance: to be saved again.
    """

    name: str
    method: str
    config: Mapping[str, Any]
    sites: Sequence[str]
    state: Mapping[str, Tensor]
    train: Sequence[str] = ()
    where: Sequence[str] | None = None
    trained: Sequence[str] | None = None
    notes: Sequence[str] = ()
    unused: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def attach_all(model: Any, file: File, wanted: Sequence[Wanted], options: Options) -> list[Attachment]:
    """Attach and fill each, or only tell what would be attached (`options.into`). torch's random state stays as it is.

    Raises:
        LoadError: one of them does not fit; nothing stays attached then.
    """
    if options.into is not None:
        options.into.extend(wanted)
        return []
    made: list[Attachment] = []
    try:
        with torch.random.fork_rng(devices=[]):
            for each in wanted:
                _refuse_twice(each)
                with filling() if options.strict else contextlib.nullcontext(), claiming(_sizes(each), options.strict):
                    made.append(_attach(model, each, _name(model, each.name, options, len(wanted) > 1)))
                report = made[-1].load_state_dict(each.state, options.strict)
                unused = (*report.unused, *each.unused)
                made[-1].loaded = dataclasses.replace(report, unused=unused, notes=tuple(each.notes))
    except BaseException as error:
        for attachment in reversed(made):
            attachment.detach()
        if isinstance(error, VeneerError):
            raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
        raise
    return made


def refuse_merged(tower: nn.Module, error: type[SaveError] | type[LoadError]) -> None:
    """Raise `error` while an attachment is in the weights, so that they are not the base's own."""
    ledger = peek(tower)
    if ledger is not None and ledger.merged:
        name = ledger.merged[-1].name
        message = f"'{name}' is merged into the base, which is another one now. Call its unmerge() first."
        raise error(message, where=name, given="merged")


def _refuse_twice(each: Wanted) -> None:
    """Raise if a site is there twice: of two layers that are called differently only one would count."""
    site = twice(each.sites)
    if site is not None:
        message = f"two layers of the file change '{site}', by two of its names. Keep the one that is meant."
        raise LoadError(message, where=site, given=2, expected=1)


def _sizes(each: Wanted) -> dict[str, int]:
    """How many numbers the file holds for each site; for "" in all."""
    found = {"": sum(tensor.numel() for tensor in each.state.values())}
    for key, tensor in each.state.items():
        site = key.rpartition(":")[0]
        found[site] = found.get(site, 0) + tensor.numel()
    return found


def _attach(model: Any, each: Wanted, name: str) -> Attachment:
    names = [[f"name:{site}" for site in sites] for sites in (each.sites, each.train)]
    attachment = attach(model, method_of(each.method, each.config), where=names[0], name=name, train=names[1])
    attachment.where = tuple(each.where if each.where is not None else names[0])
    attachment.train = tuple(each.trained if each.trained is not None else names[1])
    attachment.provenance = dict(each.provenance)
    for site, adapter in attachment.parts.values():  # no dropout in a model that is in use
        adapter.train(attachment.towers[site.component].training)
    return attachment


def method_of(name: str, config: Mapping[str, Any]) -> Method:
    """The method of that name and config.

    Raises:
        LoadError: there is none, it has no such options, or an option is none that it can have.
    """
    try:
        method = methods.get(name)
        refuse_options(method, config)
        return method.from_config(config)
    except (VeneerError, TypeError, ValueError) as error:
        message = (
            f"the method '{name[:80]}' with {_short(config)} cannot be built here: {error} Install the package or the version of "
            "veneer that the file was made with."
        )
        option = getattr(error, "name", "") if isinstance(error, UnknownOption) else getattr(error, "option", "")
        raise LoadError.from_error(error, message, where=name[:80], option=option) from error


def migrated(file: File, entry: Mapping[str, Any], config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """The options of a saved attachment as the installed method has them. An unknown method's stay as they are.

    Raises:
        LoadError: the entry is of a later revision of the method, or of an earlier one that cannot be loaded.
    """
    name, revision = entry["method"], entry.get("revision", 1)
    try:
        method = methods.get(name)
        known = {**config} if revision == method.revision else method.migrate(config, revision, tensors)
    except ValueError as error:
        raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path, where=name) from error
    except VeneerError:
        return config
    if revision > method.revision:
        raise LoadError(
            f"{file.path}: written by revision {revision} of the method '{name}'; this veneer has revision {method.revision}. "
            "Update veneer.",
            file=file.path,
            where=name,
            given=revision,
            expected=method.revision,
        )
    return known


def _short(config: Mapping[str, Any]) -> str:
    """Options as they may stand in an error."""
    told = [f"{key}={value!r}" for key, value in config.items() if not (isinstance(value, int) and abs(value) > 10**30)]
    text = ", ".join(one if len(one) <= 80 else f"{one[:80]}…" for one in told[:20])
    return text or "no options"


def _name(model: Any, saved: str, options: Options, several: bool) -> str:
    """The name asked for; else the saved one, numbered if it is taken."""
    if options.name is not None:
        return f"{options.name}-{saved}" if several else options.name
    taken = {a.name for a in attachments(model)}
    return saved if saved not in taken else next(n for i in range(2, 1000) if (n := f"{saved}_{i}") not in taken)
