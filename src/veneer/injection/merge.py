"""Folding adapters into weights and back. Unfolding copies a pristine tensor, so it is bitwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UnsupportedSite
from .forms import base_tensor
from .method import Adapter
from .parametrized import WeightSeam
from .seams import Seam
from .sites import ParamSite, Site, WeightSite

Place = tuple[str, str, str]
Pristine = dict[Place, Tensor]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors changed, bytes kept to undo it, largest absolute change."""

    tensors: int
    kept_bytes: int
    largest_change: float


def fold(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]], on: bool = True) -> tuple[Pristine, MergeReport]:
    """W ← weight(W) for every site, slice by slice, in place. All or nothing.

    Raises:
        UnsupportedSite: an adapter has no weight form, or a weight is not a floating-point tensor.
    """
    for site, adapter in parts:
        if not isinstance(site, (WeightSite, ParamSite)) or not hasattr(adapter, "weight"):
            raise UnsupportedSite(f"{site.name}: {type(adapter).__name__} has no weight form and cannot be merged.")
        if not base_tensor(towers[site.component], site.path, site.param).is_floating_point():
            raise UnsupportedSite(f"{site.name}: a quantised weight cannot take a merge. Load the base unquantised.")
    pristine: Pristine = {}
    largest = 0.0
    with torch.no_grad():
        for site, adapter in parts:
            assert isinstance(site, (WeightSite, ParamSite))
            place = (site.component, site.path, site.param)
            weight = base_tensor(towers[site.component], site.path, site.param)
            pristine.setdefault(place, weight.detach().clone())
            rows = weight[slice(*site.rows)] if site.rows else weight
            after = WeightSeam.change(adapter, rows)
            if rows.numel() and rows.device.type != "meta":
                largest = max(largest, (after - rows).abs().max().item())
            rows.copy_(after)
    kept = sum(t.numel() * t.element_size() for t in pristine.values())
    return pristine, MergeReport(len(pristine), kept, largest)


def unfold(towers: Mapping[str, nn.Module], pristine: Pristine) -> None:
    """Copy the pristine tensors back."""
    with torch.no_grad():
        for (component, path, param), tensor in pristine.items():
            base_tensor(towers[component], path, param).copy_(tensor)


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
