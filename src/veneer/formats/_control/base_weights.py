"""Trained weights of a UNet in a file of their own, beside the file of the network that they were trained with."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from veneer.injection import LoadError, SaveError
from veneer.injection.attachment.model_state import peek
from veneer.injection.seams.adapter_calls import base_tensor, module_at
from veneer.injection.sites import ParamSite, WeightSite
from veneer.injection.towers import Tower

from .._core.attach import refuse_merged
from .._core.format import Options
from .._io.reader import File, is_finite, read
from .._names.modules import first_release
from .networks import fit

ADDED = {"unet.safetensors": False, "unet_weight_increasements.safetensors": True}  # name to whether it should hold increments
PICKLED = ("unet.bin", "unet_weight_increasements.bin")
OF = "of"  # in the header of a file that we wrote: the name of the network's file


@dataclass
class Beside:
    """What a file beside says of the base, as `Wanted` takes it.

    Args:
        train: names of the sites whose parameters it replaces. `state`: their tensors, under `site-name:parameter`.
        notes: remarks for the report. `unused`: keys that the UNet has no place for.
    """

    train: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_beside(path: Path, tower: Tower, options: Options, form: str) -> Beside:
    """Read the base weights that lie beside a network's file; nothing where there are none.

    A name does not tell whether tensors replace the base's or are added to them, since the authors' code has both under both. So
    it is told by the values: whole weights are near the base's, increments near zero. Where neither is twice as near, the name
    counts. W + increment is taken in single precision or wider and rounded to the base's dtype once. Tensors may also be called
    as in the base's first release (`input_blocks.…`).

    Args:
        path: of the network's file. `form`: name of the format.
    Raises:
        LoadError: there are two such files, one is damaged, or it does not fit; or the base is merged, without values,
            quantised, or trained by another attachment.
    """
    known = [path.with_name(name) for name in ADDED if name != path.name]
    files = [read(place) for place in known if place.is_file()]
    away = [file for file in files if _of_another(file, path)]
    notes = [f"{f.path.name} beside it belongs to {f.metadata[OF]} and was not loaded" for f in away]
    notes += [f"{n} beside it is a pickle and was not loaded" for n in PICKLED if path.with_name(n).is_file()]
    files = [file for file in files if file not in away]
    if len(files) > 1:
        message = f"{path}: {' and '.join(ADDED)} are both beside it. Keep the one that belongs to it."
        raise LoadError(message, file=path, given=tuple(ADDED), expected=1)
    if not files:
        return Beside(notes=notes)
    found = _read(files[0], tower, options, form)
    found.notes[:0] = notes
    return found


def _of_another(file: File, path: Path) -> bool:
    """True if a file belongs to another network that is here as well."""
    of = file.metadata.get(OF, path.name)
    return of != path.name and os.path.isfile(path.parent / of)


def _read(file: File, tower: Tower, options: Options, form: str) -> Beside:
    sites = {f"{s.path}.{s.param}": s for s in _sites(tower)}
    keys = {own: key for own, first in first_release(tower.module, sites).items() for key in (first, own) if key in file.shapes}
    before = _before(file, tower, keys if options.into is None else ())
    base = _base(file, tower, {own: sites[own] for own in keys}, before)
    fitting = fit(file, {own: tuple(t.shape) for own, t in base.items()}, keys, tower, options, form)
    tensors = file.tensors(finite=options.strict, names={keys[own] for own in base})
    given = {own: tensors[keys[own]] for own in base}
    added = _are_added(file, given, base)
    values = {key: _value(tensor, base[key], added) for key, tensor in given.items()}
    wide = [key for key, value in values.items() if options.strict and not is_finite(value)]
    if wide:
        dtype = base[wide[0]].dtype
        message = f"{file.path}: '{wide[0]}' is too large for {dtype}. Load the base in single precision."
        raise LoadError(message, file=file.path, where=wide[0], expected=dtype)
    taken = {key: value for key, value in values.items() if OF in file.metadata or not torch.equal(value, base[key].cpu())}
    how = "added to the base's" if added else "in the base's place"
    found = Beside(notes=[f"{file.path.name} beside it: {len(taken)} tensors, {how}"], unused=fitting.unused)
    for site in _chosen({key: sites[key] for key in taken}, tower):
        found.train.append(site.name)
        for param, tensor in _params(site, tower):
            path = f"{site.path}.{param}"
            found.state[f"{site.name}:{param}"] = taken.get(path, before.get(path, tensor.detach()))
    return found


def _sites(tower: Tower) -> Iterator[WeightSite | ParamSite]:
    """One for each whole tensor of a tower that may be trained."""
    return (s for s in tower.sites if isinstance(s, (WeightSite, ParamSite)) and s.rows is None)


def _params(site: WeightSite | ParamSite, tower: Tower) -> Iterator[tuple[str, Tensor]]:
    """What is trained with a site: of a weight, all that its module has."""
    module = module_at(tower.module, site.path)
    names = [site.param] if isinstance(site, ParamSite) else [site.param, *(n for n, _ in module.named_parameters(recurse=False))]
    return ((name, base_tensor(tower.module, site.path, name)) for name in dict.fromkeys(names))


def _chosen(taken: Mapping[str, WeightSite | ParamSite], tower: Tower) -> list[WeightSite | ParamSite]:
    """The sites of some tensors, without biases that come with their weight."""
    weights = [site for site in taken.values() if isinstance(site, WeightSite)]
    covered = {f"{site.path}.{param}" for site in weights for param, _ in _params(site, tower)}
    return [*weights, *(s for key, s in taken.items() if isinstance(s, ParamSite) and key not in covered)]


def _before(file: File, tower: Tower, wanted: Collection[str]) -> dict[str, Tensor]:
    """The base's own values of what attachments train.

    Raises:
        LoadError: one of them trains a tensor of `wanted`; or the base is merged.
    """
    refuse_merged(tower.module, LoadError)
    ledger, before = peek(tower.module), dict[str, Tensor]()
    for attachment in ledger.attachments if ledger else ():
        for key, (component, path) in attachment.extras.items():
            if attachment.towers[component] is not tower.module:
                continue
            if path in wanted:
                raise LoadError(
                    f"{file.path}: '{attachment.name}' has trained '{path}' of the base as well, and only one value can be "
                    "there. Detach it first.",
                    file=file.path,
                    where=path,
                    given=attachment.name,
                )
            before.setdefault(path, attachment.trained.before[key])
    return before


def _base(
    file: File, tower: Tower, sites: Mapping[str, WeightSite | ParamSite], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The base's own tensors at some places."""
    found = {own: before.get(own, base_tensor(tower.module, s.path, s.param)).detach() for own, s in sites.items()}
    bad = next((own for own, t in found.items() if t.is_meta or not t.is_floating_point()), None)
    if bad:
        why = "quantised, or on the meta device"
        message = f"{file.path}: '{bad}' of the base is {why}. Load the base in half or single precision."
        raise LoadError(message, file=file.path, where=bad, given=why)
    return found


def _are_added(file: File, given: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bool:
    """True if the tensors are increments."""
    if OF in file.metadata:
        return False
    size = away = 0.0
    for key, tensor in given.items():
        if tensor.shape == base[key].shape:
            wide = tensor.float()
            size += float(wide.norm()) ** 2
            away += float((wide - base[key].cpu().float()).norm()) ** 2
    return ADDED[file.path.name] if size <= 4 * away and away <= 4 * size else size < away


def _value(tensor: Tensor, base: Tensor, added: bool) -> Tensor:
    """What the base's tensor becomes, on the CPU; one of another shape as it is, for the report."""
    if tensor.shape != base.shape:
        return tensor
    if added:
        wide = torch.promote_types(torch.promote_types(tensor.dtype, base.dtype), torch.float32)
        tensor = base.cpu().to(wide) + tensor.to(wide)
    return tensor.to(base.dtype)


def replaced(target: Path, trained: bool) -> list[Path]:
    """Files beside `target` that were written with it before, and are stale once it is written anew.

    Args:
        trained: base weights will be written beside it.
    Raises:
        SaveError: there is one that was not, which would be loaded with the new file or be overwritten.
    """
    if trained and target.name in ADDED:
        message = f"{target}: that is the name of the base weights beside it. Choose another."
        raise SaveError(message, file=target, given=target.name)
    stale = []
    for there in (target.with_name(name) for name in ADDED if name != target.name):
        of = _owner(there)
        if of == target.name:
            stale.append(there)
        elif there.is_file() and (trained or not of or not os.path.isfile(target.parent / of)):
            whose = of or "a file that veneer did not write"
            raise SaveError(
                f"{there}: it belongs to {whose}, and would be taken for that of {target.name}. Save to another folder.",
                file=there,
                given=of or None,
                expected=target.name,
            )
    return stale


def _owner(path: Path) -> str:
    """The network's file that base weights belong to, or nothing."""
    try:
        return read(path).metadata.get(OF, "") if path.is_file() else ""
    except LoadError:
        return ""
