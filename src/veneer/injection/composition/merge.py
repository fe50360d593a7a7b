"""Merges adapters into weights, and restores the weights. W' is allocated beside W, so W is restored bitwise without a copy."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from ..adapter_forms import BiasAdapter, LowRankAdapter, WeightAdapter
from ..errors import UnsupportedSite
from ..method import Adapter
from ..seams.adapter_calls import base_tensor, blend
from ..seams.effective_weight import BiasForm, bias_site, constant_weight
from ..seams.seam import Seam
from ..sites import NormSite, ParamSite, Site, WeightSite

TensorKey = tuple[str, str, str]  # component, module path, parameter name
OriginalWeights = dict[TensorKey, Tensor]
Groups = dict[TensorKey, list[tuple[Any, Adapter]]]

CACHE = 1 << 16
"""Elements that a thread works on at a time: 256 KiB in single precision, which fits in a second-level cache."""
DIRECT_CACHE = 16 * CACHE
"""The same for a single step, for which a third-level cache is enough."""


@dataclass(frozen=True)
class MergeReport:
    """Number of changed tensors, and bytes stored for `unmerge`: the size of these tensors."""

    tensors: int
    kept_bytes: int


def merge_weights(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> tuple[OriginalWeights, MergeReport]:
    """Sets W ← weight(W) at every site, slice by slice. All or nothing.

    Parameters stay the same objects with new memory; views of the old memory keep W. A tied parameter, which other modules hold
    as well, is replaced in this module only.

    Returns:
        The original tensors, not copied, and the report.
    Raises:
        UnsupportedSite: an adapter has no weight form, or a weight cannot be changed for this module alone.
    """
    groups = _grouped(towers, parts)
    with torch.inference_mode(False), torch.no_grad():
        before = {key: _tensor(towers, key) for key in groups}
        for key, shift in _shifts(towers, parts, before):
            groups.setdefault(key, []).append(shift)
            before.setdefault(key, _tensor(towers, key))
        after = {key: merged_weight(before[key], group) for key, group in groups.items()}
        for key in _tied(towers, before):
            after[key] = nn.Parameter(after[key], requires_grad=False)
        original = _exchange(towers, after)
    return original, MergeReport(len(original), sum(t.numel() * t.element_size() for t in original.values()))


def restore_weights(towers: Mapping[str, nn.Module], original: OriginalWeights) -> None:
    """Restores the original tensors, cast and moved if the model was since."""
    with torch.inference_mode(False), torch.no_grad():
        _exchange(towers, {key: _like(tensor, _tensor(towers, key)) for key, tensor in original.items()})


def _exchange(towers: Mapping[str, nn.Module], tensors: OriginalWeights) -> OriginalWeights:
    """Replaces all tensors, or none. Returns the previous ones."""
    before: OriginalWeights = {}
    try:
        for key, tensor in tensors.items():
            before[key] = _put(towers, key, tensor)
    except BaseException:
        for key, tensor in before.items():
            _put(towers, key, tensor)
        raise
    return before


def _put(towers: Mapping[str, nn.Module], key: TensorKey, tensor: Tensor) -> Tensor:
    """Replaces a parameter by a parameter, or its data by another tensor. Returns the previous parameter or data."""
    component, path, param = key
    module: Any = towers[component].get_submodule(path)
    there = base_tensor(module, "", param)
    if isinstance(tensor, nn.Parameter):
        inner, name = (module.parametrizations[param], "original") if _chain(module, param) else (module, param)
        inner._parameters[name] = tensor
        return there
    data = there.data
    there.data = tensor
    increment_version(there)  # so that backward through the old value raises, as after any in-key change
    return data


def _tied(towers: Mapping[str, nn.Module], tensors: Mapping[TensorKey, Tensor]) -> list[TensorKey]:
    """Keys of parameters that several modules hold."""
    holders = Counter(id(t) for tower in towers.values() for m in tower.modules() for t in m._parameters.values())
    return [key for key, tensor in tensors.items() if holders[id(tensor)] > 1]


def _tensor(towers: Mapping[str, nn.Module], key: TensorKey) -> Tensor:
    component, path, param = key
    return base_tensor(towers[component], path, param)


def _like(tensor: Tensor, now: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) or (tensor.dtype, tensor.device) == (now.dtype, now.device):
        return tensor  # a tied parameter was moved and cast with its other modules
    return torch.empty_like(now.data).copy_(tensor)


def _grouped(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> Groups:
    """Groups sites and adapters by tensor.

    Raises:
        UnsupportedSite: a site cannot be merged; with the site and the reason.
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
    towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]], before: OriginalWeights
) -> Iterator[tuple[TensorKey, tuple[Any, Adapter]]]:
    """Biases after changed weights, for adapters that change the bias as well."""
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
    """Parametrizations of a tensor."""
    return list(module.parametrizations[param]) if parametrize.is_parametrized(module, param) else []


def _obstacle(module: Any, param: str) -> tuple[str, str] | None:
    """The reason why a tensor cannot be merged into, as a word and as a message; None if it can."""
    chain = _chain(module, param)
    foreign = [type(m).__name__ for m in chain if not isinstance(m, Seam)]
    if foreign or not (chain or param in module._parameters or param in module._buffers):
        made = f"by {', '.join(foreign)} " if foreign else ""
        lost = "so a merge would be lost. Fix it in key first."
        return "computed", f"{param} is computed {made}from other tensors in each forward pass, {lost}"
    tensor = base_tensor(module, "", param)
    if not tensor.is_floating_point() or type(tensor.data) is not Tensor:
        kind = f"{type(tensor.data).__name__} of {tensor.dtype}"
        message = f"adapters cannot be merged into a quantized or sharded weight ({kind}). Load the base as ordinary tensors."
        return "quantized or sharded", message
    if tensor.is_meta and hasattr(module, "_hf_hook"):
        lost = "so a merge would be lost. Load the base without offloading."
        return "offloaded", f"the weight is offloaded and copied to the device in each forward pass, {lost}"
    return None


def host_tensors(tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """State dict of the host without adapters: keys and order of the bare host, no adapter tensors."""
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


def merged_weight(weight: Tensor, group: Sequence[tuple[Any, Any]]) -> Tensor:
    """W' = weight(W) as a new tensor, each adapter in its rows.

    Computed in single precision or wider for all dtypes of weight and adapters, and rounded once.

    Args:
        group: sites and adapters; one for all rows, or several with disjoint `rows`.
    """
    after = torch.empty_like(weight)
    with _precise(weight):
        if group[0][0].rows is None:
            _merge_rows(group[0][1], weight, after)
            return after
        end = 0
        for site, adapter in sorted(group, key=lambda part: part[0].rows):
            start, stop = site.rows
            after[end:start] = weight[end:start]
            _merge_rows(adapter, weight[start:stop], after[start:stop])
            end = stop
        after[end:] = weight[end:]
    return after


def _merge_rows(adapter: Any, weight: Tensor, after: Tensor) -> None:
    with widened(adapter, torch.float32):
        if isinstance(adapter, LowRankAdapter):
            left, right = adapter.factors()
            _add(weight, left, right, after)
        else:
            wide = torch.promote_types(weight.dtype, torch.float32)
            after.copy_(blend(adapter, adapter.weight, weight.to(wide)))


def _add(weight: Tensor, left: Tensor, right: Tensor, after: Tensor) -> None:
    """W + C D in one pass over memory: blocks of rows are widened, added to and rounded while they are in a cache.

    Args:
        left, right: C (groups, d_out / groups, rank) and D (groups, rank, width).
    """
    wide = torch.promote_types(weight.dtype, left.dtype)
    groups, width = left.shape[0], right.shape[2]
    if groups > 1 or weight.device.type != "cpu":
        matrix = weight.to(wide).reshape(groups, -1, width)
        after.copy_(torch.baddbmm(matrix, left.to(wide), right.to(wide)).reshape(weight.shape))
        return
    left, right = left[0].to(wide), right[0].to(wide)
    direct = weight.dtype == wide and weight.is_contiguous() and after.is_contiguous()
    count = max(1, (DIRECT_CACHE if direct else CACHE) * torch.get_num_threads() // width)
    block = torch.empty(0 if direct else min(count, len(weight)), width, dtype=wide)
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        if direct:
            torch.addmm(weight[rows].flatten(1), left[rows], right, out=after[rows].flatten(1))
            continue
        wide_rows = block[: len(left[rows])]
        wide_rows.view(weight[rows].shape).copy_(weight[rows])
        after[rows] = wide_rows.addmm_(left[rows], right).view(weight[rows].shape)


def _precise(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast, which would round the products."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


@contextlib.contextmanager
def widened(adapter: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Casts the adapter's tensors to `dtype` or wider inside the block."""
    tensors = (*adapter.parameters(), *adapter.buffers())
    narrow = [(t, t.data) for t in tensors if t.is_floating_point() and t.itemsize < dtype.itemsize]
    try:
        for tensor, data in narrow:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
