"""Trained UNet weights that ControlNeXt stores in a second file beside the network's file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from veneer.injection import LoadError, SaveError
from veneer.injection.attachment.model_state import find_model_state
from veneer.injection.seams.adapter_calls import base_tensor, module_at
from veneer.injection.sites import ParamSite, WeightSite
from veneer.injection.towers import Tower

from .._core.attach import reject_merged
from .._core.format import Options
from .._io.reader import File, is_finite, read
from .._names.modules import original_names
from .networks import match_tensors

FILE_NAMES = {
    "unet.safetensors": False,
    "unet_weight_increasements.safetensors": True,
}  # file name -> True if it names increments
PICKLE_NAMES = ("unet.bin", "unet_weight_increasements.bin")
OF = "of"  # metadata key of files written by veneer: the file name of the network


@dataclass
class BaseWeights:
    """Base weights read from the file beside the network, in the form that the attach step expects.

    Args:
        train: names of the sites whose parameters are replaced. `state`: their tensors, under `site-name:parameter`.
        notes: remarks for the load report. `unused`: keys that match no UNet parameter.
    """

    train: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_base_weights(path: Path, tower: Tower, options: Options, form: str) -> BaseWeights:
    """Reads the base weights stored beside a network's file; returns empty weights if there is no such file.

    File names do not tell whether tensors replace the base weights or are added to them: the authors' code writes both under
    both names. The values decide: full weights are close to the base weights, increments are close to zero. If neither is closer
    by a factor of two, the file name decides. W + increment is computed in float32 or wider and rounded to the base's dtype
    once. Keys may also follow the original Stable Diffusion naming (`input_blocks.…`).

    Args:
        path: the network's file. `form`: name of the format.
    Raises:
        LoadError: both files exist, one is corrupt, or it does not match the UNet; or the base is merged, on the meta device,
            quantized, or trained by another attachment.
    """
    known = [path.with_name(name) for name in FILE_NAMES if name != path.name]
    files = [read(place) for place in known if place.is_file()]
    away = [file for file in files if _belongs_to_another(file, path)]
    notes = [f"{f.path.name} beside it belongs to {f.metadata[OF]} and was not loaded" for f in away]
    notes += [f"{n} beside it is a pickle and was not loaded" for n in PICKLE_NAMES if path.with_name(n).is_file()]
    files = [file for file in files if file not in away]
    if len(files) > 1:
        message = (
            f"{path}: both {' and '.join(FILE_NAMES)} are beside it; expected one. Keep the one that belongs to this network."
        )
        raise LoadError(message, file=path, given=tuple(FILE_NAMES), expected=1)
    if not files:
        return BaseWeights(notes=notes)
    found = _read(files[0], tower, options, form)
    found.notes[:0] = notes
    return found


def _belongs_to_another(file: File, path: Path) -> bool:
    """True if the file belongs to a different network file that exists in the same folder."""
    of = file.metadata.get(OF, path.name)
    return of != path.name and os.path.isfile(path.parent / of)


def _read(file: File, tower: Tower, options: Options, form: str) -> BaseWeights:
    sites = {f"{s.path}.{s.param}": s for s in _sites(tower)}
    keys = {own: key for own, first in original_names(tower.module, sites).items() for key in (first, own) if key in file.shapes}
    before = _original_values(file, tower, keys if options.into is None else ())
    base = _base_tensors(file, tower, {own: sites[own] for own in keys}, before)
    fitting = match_tensors(file, {own: tuple(t.shape) for own, t in base.items()}, keys, tower, options, form)
    tensors = file.tensors(finite=options.strict, names={keys[own] for own in base})
    stored = {own: tensors[keys[own]] for own in base}
    added = _are_increments(file, stored, base)
    values = {key: _new_value(tensor, base[key], added) for key, tensor in stored.items()}
    wide = [key for key, value in values.items() if options.strict and not is_finite(value)]
    if wide:
        dtype = base[wide[0]].dtype
        message = f"{file.path}: '{wide[0]}' overflows {dtype}. Load the base model in float32."
        raise LoadError(message, file=file.path, where=wide[0], expected=dtype)
    changed = {key: value for key, value in values.items() if OF in file.metadata or not torch.equal(value, base[key].cpu())}
    how = "added to the base weights" if added else "replacing base weights"
    found = BaseWeights(notes=[f"{file.path.name} beside it: {len(changed)} tensors, {how}"], unused=fitting.unused)
    for site in _without_covered_biases({key: sites[key] for key in changed}, tower):
        found.train.append(site.name)
        for param, tensor in _params(site, tower):
            path = f"{site.path}.{param}"
            found.state[f"{site.name}:{param}"] = changed.get(path, before.get(path, tensor.detach()))
    return found


def _sites(tower: Tower) -> Iterator[WeightSite | ParamSite]:
    """Sites that cover whole trainable tensors of a tower."""
    return (s for s in tower.sites if isinstance(s, (WeightSite, ParamSite)) and s.rows is None)


def _params(site: WeightSite | ParamSite, tower: Tower) -> Iterator[tuple[str, Tensor]]:
    """Parameters trained together with a site: for a weight, all parameters of its module."""
    module = module_at(tower.module, site.path)
    names = [site.param] if isinstance(site, ParamSite) else [site.param, *(n for n, _ in module.named_parameters(recurse=False))]
    return ((name, base_tensor(tower.module, site.path, name)) for name in dict.fromkeys(names))


def _without_covered_biases(sites: Mapping[str, WeightSite | ParamSite], tower: Tower) -> list[WeightSite | ParamSite]:
    """The sites of the given tensors, without biases that are trained together with their weight."""
    weights = [site for site in sites.values() if isinstance(site, WeightSite)]
    covered = {f"{site.path}.{param}" for site in weights for param, _ in _params(site, tower)}
    return [*weights, *(s for key, s in sites.items() if isinstance(s, ParamSite) and key not in covered)]


def _original_values(file: File, tower: Tower, paths: Collection[str]) -> dict[str, Tensor]:
    """The original values of base parameters that existing attachments train.

    Raises:
        LoadError: an attachment trains one of the `wanted` tensors, or the base is merged.
    """
    reject_merged(tower.module, LoadError)
    tower_state, before = find_model_state(tower.module), dict[str, Tensor]()
    for attachment in tower_state.attachments if tower_state else ():
        for key, (component, path) in attachment.extras.items():
            if attachment.towers[component] is not tower.module:
                continue
            if path in paths:
                raise LoadError(
                    f"{file.path}: attachment '{attachment.name}' already trains the base parameter '{path}', which this file "
                    "replaces. Detach it first.",
                    file=file.path,
                    where=path,
                    given=attachment.name,
                )
            before.setdefault(path, attachment.trained.original[key])
    return before


def _base_tensors(
    file: File, tower: Tower, sites: Mapping[str, WeightSite | ParamSite], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The original base tensors of the given sites."""
    found = {own: before.get(own, base_tensor(tower.module, s.path, s.param)).detach() for own, s in sites.items()}
    bad = next((own for own, t in found.items() if t.is_meta or not t.is_floating_point()), None)
    if bad:
        why = "quantized or on the meta device"
        message = f"{file.path}: base parameter '{bad}' is {why}. Load the base model in float16, bfloat16 or float32."
        raise LoadError(message, file=file.path, where=bad, given=why)
    return found


def _are_increments(file: File, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bool:
    """True if the tensors are increments."""
    if OF in file.metadata:
        return False
    size = away = 0.0
    for key, tensor in tensors.items():
        if tensor.shape == base[key].shape:
            wide = tensor.float()
            size += float(wide.norm()) ** 2
            away += float((wide - base[key].cpu().float()).norm()) ** 2
    return FILE_NAMES[file.path.name] if size <= 4 * away and away <= 4 * size else size < away


def _new_value(tensor: Tensor, base: Tensor, added: bool) -> Tensor:
    """New value of the base tensor, on the CPU; a tensor of another shape is returned unchanged, for the report."""
    if tensor.shape != base.shape:
        return tensor
    if added:
        wide = torch.promote_types(torch.promote_types(tensor.dtype, base.dtype), torch.float32)
        tensor = base.cpu().to(wide) + tensor.to(wide)
    return tensor.to(base.dtype)


def stale_files(target: Path, trained: bool) -> list[Path]:
    """Stale files beside `target`, written with an earlier version of it, to be removed when it is overwritten.

    Args:
        trained: base weights will be written beside it.
    Raises:
        SaveError: a file beside `target` belongs to another network and would be loaded with the new file or be overwritten.
    """
    if trained and target.name in FILE_NAMES:
        message = f"{target}: this name is reserved for the base weights beside the file. Choose another."
        raise SaveError(message, file=target, given=target.name)
    stale = []
    for there in (target.with_name(name) for name in FILE_NAMES if name != target.name):
        of = _owner(there)
        if of == target.name:
            stale.append(there)
        elif there.is_file() and (trained or not of or not os.path.isfile(target.parent / of)):
            whose = of or "a file that veneer did not write"
            raise SaveError(
                f"{there}: belongs to {whose}, but would be loaded together with {target.name}. Save to another folder.",
                file=there,
                given=of or None,
                expected=target.name,
            )
    return stale


def _owner(path: Path) -> str:
    """File name of the network that base weights belong to, or an empty string."""
    try:
        return read(path).metadata.get(OF, "") if path.is_file() else ""
    except LoadError:
        return ""
