"""Merges adapters into weights, and restores the weights. W' has new memory, so W is restored bitwise without a copy."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from ..adapter_forms import BiasAdapter, LowRankAdapter, WeightAdapter
from ..attachment.probe import eval_mode
from ..errors import UnsupportedSite
from ..method import Adapter
from ..quantized_weight import float_tensor, is_ordinary, is_quantized, release, stored_state
from ..seams.adapter_calls import base_tensor, blend
from ..seams.effective_weight import BiasForm, bias_site, constant_weight
from ..seams.seam import Seam
from ..sites import NormSite, ParamSite, Site, WeightSite
from .requantization import Rounding, TensorKey, merge_obstacle, quantize_again

OriginalWeights = dict[TensorKey, Tensor]
Groups = dict[TensorKey, list[tuple[Any, Adapter]]]

CACHE = 1 << 16
"""Elements per thread and block: 256 KiB in single precision, which fits in the L2 cache."""
DIRECT_CACHE = 16 * CACHE
"""Elements per thread and block of a single `addmm`, for which the L3 cache is enough."""


@dataclass(frozen=True)
class MergeReport:
    """Number of changed tensors, bytes stored for `unmerge`, and by name the errors of weights that were quantized again."""

    tensors: int
    stored_bytes: int
    rounding: Mapping[str, Rounding] = field(default_factory=dict)


def merge_weights(
    towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]], requantize: bool = False
) -> tuple[OriginalWeights, MergeReport]:
    """Sets W ← weight(W) at every site, slice by slice. All or nothing.

    Parameters stay the same objects and get new memory; views of the old memory keep W. A tied parameter, which several modules
    share, is replaced in the adapted module only. With `requantize`, W' is quantized again where W is quantized.

    Returns:
        The original tensors, not copied, and the report.
    Raises:
        UnsupportedSite: an adapter has no weight form, or a weight is quantized, offloaded or computed from other tensors.
    """
    groups = _group_by_tensor(towers, parts, requantize)
    with torch.inference_mode(False), torch.no_grad():
        before = {key: float_tensor(towers[key[0]], *key[1:]) for key in groups}
        for key, part in _bias_parts(towers, parts, before):
            groups.setdefault(key, []).append(part)
            before.setdefault(key, _tensor(towers, key))
        after = {key: merged_weight(before[key], group) for key, group in groups.items()}
        for key in _tied_keys(towers, before):
            after[key] = nn.Parameter(after[key], requires_grad=False)
        rounding = quantize_again(towers, before, after)
        original = _replace_all(towers, after)
    return original, MergeReport(len(original), sum(t.numel() * t.element_size() for t in original.values()), rounding)


def restore_weights(towers: Mapping[str, nn.Module], original: OriginalWeights) -> None:
    """Restores the original tensors, with the current dtype and device of the model."""
    with torch.inference_mode(False), torch.no_grad():
        _replace_all(towers, {key: _cast_like(tensor, _tensor(towers, key)) for key, tensor in original.items()})


def _replace_all(towers: Mapping[str, nn.Module], tensors: OriginalWeights) -> OriginalWeights:
    """Replaces all tensors, or none. Returns the previous ones."""
    before: OriginalWeights = {}
    try:
        for key, tensor in tensors.items():
            before[key] = _replace(towers, key, tensor)
    except BaseException:
        for key, tensor in before.items():
            _replace(towers, key, tensor)
        raise
    return before


def _replace(towers: Mapping[str, nn.Module], key: TensorKey, tensor: Tensor) -> Tensor:
    """Replaces the parameter itself if `tensor` is a parameter, else its data. Returns the previous parameter or data."""
    component, path, param = key
    module: Any = towers[component].get_submodule(path)
    current = base_tensor(module, "", param)
    if isinstance(tensor, nn.Parameter):
        release(module, param)
        owner, name = (module.parametrizations[param], "original") if _parametrizations(module, param) else (module, param)
        owner._parameters[name] = tensor
        return current
    data = current.data
    current.data = tensor
    increment_version(current)  # so that backward through the old value raises, as after other in-place operations
    return data


def _tied_keys(towers: Mapping[str, nn.Module], tensors: Mapping[TensorKey, Tensor]) -> list[TensorKey]:
    """Keys of parameters that several modules share."""
    owners = Counter(id(t) for tower in towers.values() for m in tower.modules() for t in m._parameters.values())
    return [key for key, tensor in tensors.items() if owners[id(tensor)] > 1]


def _tensor(towers: Mapping[str, nn.Module], key: TensorKey) -> Tensor:
    component, path, param = key
    return base_tensor(towers[component], path, param)


def _cast_like(tensor: Tensor, current: Tensor) -> Tensor:
    if is_quantized(tensor):
        return tensor if tensor.device == current.device else tensor.to(current.device)
    if isinstance(tensor, nn.Parameter) or (tensor.dtype, tensor.device) == (current.dtype, current.device):
        return tensor  # a tied parameter was moved and cast with the other modules that share it
    return torch.empty_like(current.data).copy_(tensor)


def _group_by_tensor(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]], requantize: bool) -> Groups:
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
        obstacle = _merge_obstacle(towers[site.component].get_submodule(site.path), site.param, requantize)
        if obstacle:
            raise UnsupportedSite(f"{site.name}: {obstacle[1]}", site=site.name, given=obstacle[0])
        groups.setdefault((site.component, site.path, site.param), []).append((site, adapter))
    return groups


def _bias_parts(
    towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]], before: OriginalWeights
) -> Iterator[tuple[TensorKey, tuple[Any, Adapter]]]:
    """Key, site and bias form of the biases that adapters change together with the weight."""
    for site, adapter in parts:
        if isinstance(adapter, BiasAdapter):
            weight_site: Any = site
            bias = bias_site(weight_site, adapter)
            obstacle = _merge_obstacle(towers[site.component].get_submodule(bias.path), bias.param)
            if obstacle:
                raise UnsupportedSite(f"{site.name}: {obstacle[1]}", site=site.name, given=obstacle[0])
            weight = before[site.component, weight_site.path, weight_site.param]
            form = BiasForm(adapter, constant_weight(weight, weight_site.rows))
            yield (site.component, bias.path, bias.param), (bias, form)


def _parametrizations(module: Any, param: str) -> Sequence[nn.Module]:
    """Parametrizations of a tensor."""
    return list(module.parametrizations[param]) if parametrize.is_parametrized(module, param) else []


def _merge_obstacle(module: Any, param: str, requantize: bool = False) -> tuple[str, str] | None:
    """Why adapters cannot be merged into a tensor: a keyword and a message. None if they can."""
    parametrizations = _parametrizations(module, param)
    foreign = [type(m).__name__ for m in parametrizations if not isinstance(m, Seam)]
    if foreign or not (parametrizations or param in module._parameters or param in module._buffers):
        source = f"by {', '.join(foreign)} " if foreign else ""
        hint = "so a merge would be lost. Remove the parametrization first."
        return "computed", f"{param} is computed {source}from other tensors in each forward pass, {hint}"
    tensor = base_tensor(module, "", param)
    if is_quantized(tensor):
        return merge_obstacle(module, param, tensor, requantize)
    if not is_ordinary(tensor):
        kind = f"{type(tensor.data).__name__} of {tensor.dtype}"
        message = (
            f"adapters cannot be merged into a quantized or sharded weight ({kind}). Load the base model as ordinary tensors."
        )
        return "quantized or sharded", message
    if tensor.is_meta and hasattr(module, "_hf_hook"):
        hint = "so a merge would be lost. Load the base model without offloading."
        return "offloaded", f"the weight is offloaded and copied to the device in each forward pass, {hint}"
    return None


def host_tensors(tower: nn.Module, scales: bool = True) -> Iterator[tuple[str, Tensor]]:
    """State dict of the host without adapters, with its original keys in their order. `scales`: also of quantized weights."""
    yield from _host_tensors(tower, "", scales)


def _host_tensors(module: nn.Module, prefix: str, scales: bool) -> Iterator[tuple[str, Tensor]]:
    order = module.__dict__.get("_veneer_order") or list(module._parameters)
    if scales and is_quantized(module._parameters.get("weight")) and "_veneer_order" not in module.__dict__:
        yield from stored_state(module, prefix).items()
        order = []
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
            yield from _host_tensors(child, f"{prefix}{name}.", scales)


def merged_weight(weight: Tensor, group: Sequence[tuple[Any, Any]]) -> Tensor:
    """W' = weight(W) as a new tensor, each adapter in its rows.

    Computed in single precision or wider for all dtypes of weight and adapters, in evaluation mode, and rounded once.

    Args:
        group: sites and adapters; one for all rows, or several with disjoint `rows`.
    """
    after = torch.empty_like(weight)
    with _without_autocast(weight):
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
    with widened(adapter, torch.float32), eval_mode(adapter):
        if isinstance(adapter, LowRankAdapter):
            left, right = adapter.factors()
            _add_low_rank(weight, left, right, after)
        else:
            wide = torch.promote_types(weight.dtype, torch.float32)
            after.copy_(blend(adapter, adapter.weight, weight.to(wide)))


def _add_low_rank(weight: Tensor, left: Tensor, right: Tensor, after: Tensor) -> None:
    """after = W + C D in one pass over memory: each block of rows is cast, updated and rounded while it is in the cache.

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
    block_rows = max(1, (DIRECT_CACHE if direct else CACHE) * torch.get_num_threads() // width)
    buffer = torch.empty(0 if direct else min(block_rows, len(weight)), width, dtype=wide)
    for start in range(0, len(weight), block_rows):
        rows = slice(start, start + block_rows)
        if direct:
            torch.addmm(weight[rows].flatten(1), left[rows], right, out=after[rows].flatten(1))
            continue
        wide_rows = buffer[: len(left[rows])]
        wide_rows.view(weight[rows].shape).copy_(weight[rows])
        after[rows] = wide_rows.addmm_(left[rows], right).view(weight[rows].shape)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast, which would round the products."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()


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
