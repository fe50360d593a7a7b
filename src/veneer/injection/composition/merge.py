"""Folding adapters into weights and back. A merge writes W' beside W; unfolding puts W itself back, so it is bitwise and free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from ..adapter_forms import BiasAdapter, WeightAdapter
from ..errors import UnsupportedSite
from ..method import Adapter
from ..seams.adapter_calls import base_tensor
from ..seams.effective_weight import BiasForm, bias_site, constant_weight
from ..seams.seam import Seam
from ..sites import NormSite, ParamSite, Site, WeightSite
from .merge_kernels import folded

Place = tuple[str, str, str]
Pristine = dict[Place, Tensor]
Groups = dict[Place, list[tuple[Any, Adapter]]]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors changed, and bytes kept to undo it, as many as those tensors have."""

    tensors: int
    kept_bytes: int


def fold(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> tuple[Pristine, MergeReport]:
    """W ← weight(W) for every site, slice by slice. All or nothing.

    The parameters stay the same objects, on other memory; views of the old memory keep W, as they do beside an adapter. A tied
    parameter, which other modules hold as well, is replaced in this module only, for the same reason.

    Returns:
        The tensors as they were, which are not copies, and what was done.
    Raises:
        UnsupportedSite: an adapter has no weight form, or a weight is none that can be changed for this module alone.
    """
    groups = _grouped(towers, parts)
    with torch.inference_mode(False), torch.no_grad():
        before = {place: _tensor(towers, place) for place in groups}
        for place, shift in _shifts(towers, parts, before):
            groups.setdefault(place, []).append(shift)
            before.setdefault(place, _tensor(towers, place))
        after = {place: folded(before[place], group) for place, group in groups.items()}
        for place in _tied(towers, before):
            after[place] = nn.Parameter(after[place], requires_grad=False)
        pristine = _exchange(towers, after)
    return pristine, MergeReport(len(pristine), sum(t.numel() * t.element_size() for t in pristine.values()))


def unfold(towers: Mapping[str, nn.Module], pristine: Pristine) -> None:
    """Put the pristine tensors back: themselves, or cast and moved as the model was since."""
    with torch.inference_mode(False), torch.no_grad():
        _exchange(towers, {place: _like(tensor, _tensor(towers, place)) for place, tensor in pristine.items()})


def _exchange(towers: Mapping[str, nn.Module], tensors: Pristine) -> Pristine:
    """Give every place its tensor, or none. Returns what was there."""
    before: Pristine = {}
    try:
        for place, tensor in tensors.items():
            before[place] = _put(towers, place, tensor)
    except BaseException:
        for place, tensor in before.items():
            _put(towers, place, tensor)
        raise
    return before


def _put(towers: Mapping[str, nn.Module], place: Place, tensor: Tensor) -> Tensor:
    """A parameter takes the place of the one that is there, another tensor becomes its data. Returns what was there."""
    component, path, param = place
    module: Any = towers[component].get_submodule(path)
    there = base_tensor(module, "", param)
    if isinstance(tensor, nn.Parameter):
        inner, name = (module.parametrizations[param], "original") if _chain(module, param) else (module, param)
        inner._parameters[name] = tensor
        return there
    data = there.data
    there.data = tensor
    increment_version(there)  # a backward pass through the old value is an error, as after any change in place
    return data


def _tied(towers: Mapping[str, nn.Module], tensors: Mapping[Place, Tensor]) -> list[Place]:
    """The places whose parameter several modules hold."""
    holders = Counter(id(t) for tower in towers.values() for m in tower.modules() for t in m._parameters.values())
    return [place for place, tensor in tensors.items() if holders[id(tensor)] > 1]


def _tensor(towers: Mapping[str, nn.Module], place: Place) -> Tensor:
    component, path, param = place
    return base_tensor(towers[component], path, param)


def _like(tensor: Tensor, now: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) or (tensor.dtype, tensor.device) == (now.dtype, now.device):
        return tensor  # a tied one has gone where its other holders went
    return torch.empty_like(now.data).copy_(tensor)


def _grouped(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> Groups:
    """The parts of every tensor.

    Raises:
        UnsupportedSite: one of them cannot be merged; it says which, and why.
    """
    groups: Groups = {}
    for site, adapter in parts:
        if not isinstance(site, (WeightSite, ParamSite, NormSite)) or not isinstance(adapter, WeightAdapter):
            raise UnsupportedSite(
                f"{site.name}: {type(adapter).__name__} has no weight form and cannot be merged.",
                site=site.name,
                given=type(adapter).__name__,
                expected="weight",
            )
        why = _obstacle(towers[site.component].get_submodule(site.path), site.param)
        if why:
            raise UnsupportedSite(f"{site.name}: {why[1]}", site=site.name, given=why[0])
        groups.setdefault((site.component, site.path, site.param), []).append((site, adapter))
    return groups


def _shifts(
    towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]], before: Pristine
) -> Iterator[tuple[Place, tuple[Any, Adapter]]]:
    """The biases that follow changed weights, for adapters that change them as well."""
    for site, adapter in parts:
        if isinstance(adapter, BiasAdapter):
            found: Any = site
            shift = bias_site(found, adapter)
            why = _obstacle(towers[site.component].get_submodule(shift.path), shift.param)
            if why:
                raise UnsupportedSite(f"{site.name}: {why[1]}", site=site.name, given=why[0])
            weight = before[site.component, found.path, found.param]
            yield (site.component, shift.path, shift.param), (shift, BiasForm(adapter, constant_weight(weight, found.rows)))


def _chain(module: Any, param: str) -> Sequence[nn.Module]:
    """The parametrisations of a tensor."""
    return list(module.parametrizations[param]) if parametrize.is_parametrized(module, param) else []


def _obstacle(module: Any, param: str) -> tuple[str, str] | None:
    """Why a tensor cannot take a merge, if it cannot: in one word, and as a message."""
    chain = _chain(module, param)
    foreign = [type(m).__name__ for m in chain if not isinstance(m, Seam)]
    if foreign or not (chain or param in module._parameters or param in module._buffers):
        made = f"by {', '.join(foreign)} " if foreign else ""
        lost = "so a merge would be lost. Fix it in place first."
        return "computed", f"its {param} is computed {made}from other tensors in each pass, {lost}"
    tensor = base_tensor(module, "", param)
    if not tensor.is_floating_point() or type(tensor.data) is not Tensor:
        kind = f"{type(tensor.data).__name__} of {tensor.dtype}"
        message = f"a quantised or sharded weight ({kind}) cannot take a merge. Load the base as ordinary tensors."
        return "quantized or sharded", message
    if tensor.is_meta and hasattr(module, "_hf_hook"):
        lost = "so a merge would be lost. Load the base whole."
        return "offloaded", f"its weight is offloaded and comes for each pass from elsewhere, {lost}"
    return None


def host_tensors(tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The host's state dict as it is without adapters: keys and order of the bare host, no adapter tensors."""
    yield from _walk(tower, "")


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    order = module.__dict__.get("_veneer_order") or list(module._parameters)
    for name in order:
        tensor = base_tensor(module, "", name)
        if tensor is not None:
            yield prefix + name, tensor.detach()
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer.detach()
    for name, child in module._modules.items():
        if (
            child is not None
            and not isinstance(child, Seam)
            and not (name == "parametrizations" and "_veneer_order" in module.__dict__)
        ):
            yield from _walk(child, f"{prefix}{name}.")
