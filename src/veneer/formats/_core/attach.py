"""Attaches the adapters of a file to a model, all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, Method, SaveError, VeneerError, attach, attachments, methods
from veneer.injection.attachment.deferred_init import defer_init, limit_sizes
from veneer.injection.attachment.model_state import find_model_state
from veneer.injection.errors import UnknownOption

from .._io.header import first_duplicate
from .._io.reader import File
from .format import Options
from .options import validate_options


@dataclass(frozen=True)
class AttachmentSpec:
    """Specification of one attachment to make.

    Args:
        name: of the attachment. `config`: options of the method called `method`.
        sites: names of the sites that get an adapter. `train`: names of the sites whose parameters are replaced.
        state: tensors in the layout of `Attachment.load_state_dict`.
        where, trained: the selections used when the adapter was created, for saving it again; None means the site names.
        notes: remarks for the load report. `unused`: keys that match nothing in the model, for the report.
        provenance: for saving it again.
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


def attach_all(model: Any, file: File, specs: Sequence[AttachmentSpec], options: Options) -> list[Attachment]:
    """Attaches and loads each specification, or only collects them (`options.into`). The global random state is preserved.

    Raises:
        LoadError: one of them does not match the model; nothing stays attached then.
    """
    specs = specs if options.heads else [each for each in specs if not is_head_method(each.method)]
    if options.into is not None:
        options.into.extend(specs)
        return []
    made: list[Attachment] = []
    try:
        with torch.random.fork_rng(devices=[]):
            for each in specs:
                _reject_duplicate_sites(each)
                with (
                    defer_init() if options.strict else contextlib.nullcontext(),
                    limit_sizes(_parameters_by_site(each), options.strict),
                ):
                    made.append(_attach(model, each, _choose_name(model, each.name, options, len(specs) > 1)))
                report = made[-1].load_state_dict(each.state, options.strict, options.assign)
                unused = (*report.unused, *each.unused)
                made[-1].loaded = dataclasses.replace(report, unused=unused, notes=tuple(each.notes))
    except BaseException as error:
        for attachment in reversed(made):
            attachment.detach()
        if isinstance(error, VeneerError):
            raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
        raise
    return made


def is_head_method(name: str) -> bool:
    """True for a method that acts on the classifier's head alone, such as `linear_probe`."""
    needs = methods.get(name).needs if name in methods.names() else ()
    return bool(needs) and all(need.roles and {*need.roles} <= {"head", "bias.head"} for need in needs)


def reject_merged(tower: nn.Module, error: type[SaveError] | type[LoadError]) -> None:
    """Raises `error` while an attachment is merged, because the weights are then not the base's original ones."""
    tower_state = find_model_state(tower)
    if tower_state is not None and tower_state.merged:
        name = tower_state.merged[-1].name
        message = f"'{name}' is merged into the base weights. Call its unmerge() first."
        raise error(message, where=name, given="merged")


def _reject_duplicate_sites(each: AttachmentSpec) -> None:
    """Raises if a site occurs twice: two layers with different names refer to it, and only one would be used."""
    site = first_duplicate(each.sites)
    if site is not None:
        message = f"two layers of the file refer to '{site}' by different names. Remove one of them."
        raise LoadError(message, where=site, given=2, expected=1)


def _parameters_by_site(each: AttachmentSpec) -> dict[str, int]:
    """Number of parameters in the file for each site, eight in a byte, which may have bits; the total under ""."""
    counts = {key: tensor.numel() * (8 if tensor.dtype == torch.uint8 else 1) for key, tensor in each.state.items()}
    found = {"": sum(counts.values())}
    for key, count in counts.items():
        site = key.rpartition(":")[0]
        found[site] = found.get(site, 0) + count
    return found


def _attach(model: Any, each: AttachmentSpec, name: str) -> Attachment:
    names = [[f"name:{site}" for site in sites] for sites in (each.sites, each.train)]
    attachment = attach(model, build_method(each.method, each.config), where=names[0], name=name, train=names[1])
    attachment.where = tuple(each.where if each.where is not None else names[0])
    attachment.train = tuple(each.trained if each.trained is not None else names[1])
    attachment.provenance = dict(each.provenance)
    for site, adapter in attachment.parts.values():  # no dropout if the model is in evaluation mode
        adapter.train(attachment.towers[site.component].training)
    return attachment


def build_method(name: str, config: Mapping[str, Any]) -> Method:
    """The method with the given name and config.

    Raises:
        LoadError: there is no such method, it has no such option, or an option value is invalid.
    """
    try:
        method = methods.get(name)
        validate_options(method, config)
        return method.from_config(config)
    except (VeneerError, TypeError, ValueError) as error:
        message = (
            f"cannot build method '{name[:80]}' with {_describe_options(config)}: {error} Install the package or the version of "
            "veneer that wrote the file."
        )
        option = getattr(error, "name", "") if isinstance(error, UnknownOption) else getattr(error, "option", "")
        raise LoadError.from_error(error, message, where=name[:80], option=option) from error


def migrate_config(
    file: File, entry: Mapping[str, Any], config: Mapping[str, Any], tensors: Collection[str]
) -> Mapping[str, Any]:
    """The options of a saved attachment, converted to the installed revision of the method; unchanged for an unknown method.

    Raises:
        LoadError: the entry was written by a later revision of the method, or by an earlier one that cannot be converted.
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
            f"{file.path}: written by revision {revision} of method '{name}'; the installed veneer has revision "
            f"{method.revision}. Update veneer.",
            file=file.path,
            where=name,
            given=revision,
            expected=method.revision,
        )
    return known


def _describe_options(config: Mapping[str, Any]) -> str:
    """Options, shortened for an error message."""
    options = [f"{key}={value!r}" for key, value in config.items() if not (isinstance(value, int) and abs(value) > 10**30)]
    text = ", ".join(one if len(one) <= 80 else f"{one[:80]}…" for one in options[:20])
    return text or "no options"


def _choose_name(model: Any, saved: str, options: Options, several: bool) -> str:
    """The requested name, or the saved name with a number appended if it is taken."""
    if options.name is not None:
        return f"{options.name}-{saved}" if several else options.name
    existing = {a.name for a in attachments(model)}
    return saved if saved not in existing else next(n for i in range(2, 1000) if (n := f"{saved}_{i}") not in existing)
