"""DoRA's magnitudes: files store m, veneer stores m − ‖W‖; converting needs the base weight W."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.injection import VeneerError
from veneer.injection.attachment.model_state import find_model_state
from veneer.injection.quantized_weight import float_tensor
from veneer.injection.sites import WeightSite

from .._lycoris.codec import AdapterGroup, LycorisModule, SiteTensors, put, spans, take

SCALE = "dora_scale"
Axis = Literal["output", "input"]
Delta = Callable[[], Tensor]  # s·ΔW in the weight's shape
GAIN_TOLERANCE = 1e-6  # relative: gains of the slices of a fused projection closer than this are equal


def magnitude_delta(magnitude: Tensor, weight: Tensor, change: Delta, axis: Axis = "output") -> Tensor:
    """m − ‖W‖ per channel, for a file's m; for a zero channel of W, m / ‖s·ΔW‖ − 1, which `dora` adds to 1 as a factor.

    Computed in double precision, because m and ‖W‖ are nearly equal.

    Args:
        magnitude: m, in any shape. `weight`: W, (d_out, …), of the base. `change`: s·ΔW of the same layer.
    Returns:
        (d_out,), or (d_in / groups,) on the input axis.
    """
    before, after = _norms(weight, change, axis)
    m = magnitude.detach().flatten().to(before)
    return torch.where(before > 0, m - before, torch.where(after > 0, m / after, 1.0) - 1).to(torch.float32)


def magnitude(delta: Tensor, weight: Tensor, change: Delta, axis: Axis = "output") -> Tensor:
    """m per channel, in double precision: the inverse of `magnitude_delta`."""
    before, after = _norms(weight, change, axis)
    stored = delta.detach().flatten().to(before)
    return torch.where(before > 0, before + stored, (1 + stored) * after)


def axis_of(module: LycorisModule) -> Axis:
    """Axis of a file's magnitudes, by their shape: (d_out, 1, …) or (1, d_in / groups, …).

    Raises:
        LoadError: the shape is neither.
    """
    m, width = module.parts[SCALE], module.first.weight_shape[1]
    if m.ndim and m.numel() == m.shape[0] == module.rows:
        return "output"
    module.expect(
        m.ndim > 1 and m.numel() == m.shape[1] == width, f"{SCALE} ({module.rows}, 1) of outputs, or (1, {width}) of inputs"
    )
    return "input"


def add_magnitudes(
    module: LycorisModule, pieces: list[SiteTensors], change: Callable[[SiteTensors], Tensor]
) -> list[SiteTensors]:
    """The pieces of all sites of a module, with their magnitudes added.

    Args:
        pieces: one per site. `change`: s·ΔW of a piece, in the weight's shape.
    """
    axis = axis_of(module)
    weights = {p.site.name: base_weight(module.towers[p.site.component], p.site) for p in pieces}
    changes: dict[str, Delta] = {p.site.name: partial(change, p) for p in pieces}
    magnitudes = _by_site(module, axis, weights, changes)
    return [
        SiteTensors(
            p.site,
            {**p.options, "norm_axis": axis},
            {**p.state, "magnitude_delta": magnitude_delta(magnitudes[name], weights[name], changes[name], axis)},
        )
        for p in pieces
        for name in [p.site.name]
    ]


def _by_site(module: LycorisModule, axis: Axis, weights: Mapping[str, Tensor], changes: Mapping[str, Delta]) -> dict[str, Tensor]:
    """m of each site. On the input axis, a slice of a fused projection gets the norm of its rows: same W'."""
    m = module.parts[SCALE]
    if axis == "output":
        return {name: take(m, rows) for name, rows in spans(module.place).items() if name in weights}
    if len(module.place.sites) == 1:
        return dict.fromkeys(weights, m)
    squares = {name: _updated_norms(weights[name], changes[name]).square() for name in weights}
    whole = torch.stack([*squares.values()]).sum(0)
    flat = m.flatten().to(whole)
    return {name: flat * (square / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt() for name, square in squares.items()}


def magnitude_tensors(group: AdapterGroup, change: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The magnitudes of a group as one tensor; empty if its adapters have none.

    Args:
        change: s·ΔW of an adapter, in the weight's shape.
    Raises:
        SaveError: slices of a fused projection differ in axis or in the gains of their inputs, so that no single m fits them.
    """
    axes = {a.norm_axis for a in group.adapters.values()}
    if len(axes) > 1:
        why = f"is a slice of '{group.place.names[0]}', one weight in this format, and the slices differ in norm_axis"
        raise group.error(why, given=group.place.names[0], expected="norm_axis")
    (axis,) = axes
    if axis is None:
        return {}
    ms, afters = {}, {}
    for site in group.place.sites:
        weight, adapter = base_weight(group.towers[site.component], site), group.adapters.get(site.name)
        if adapter is None:
            delta, shift = weight.new_zeros(weight.shape[0 if axis == "output" else 1]), partial(torch.zeros_like, weight)
        else:
            delta, shift = adapter.magnitude_delta, partial(change, adapter)
        ms[site.name] = magnitude(delta, weight, shift, axis)
        if axis == "input" and len(group.place.sites) > 1:
            afters[site.name] = _updated_norms(weight, shift)
    if axis == "output":
        return {SCALE: put(group.place, ms).to(torch.float32).view(-1, 1, *group.ones)}
    return {SCALE: _merge_magnitudes(group, ms, afters).to(torch.float32).view(1, -1, *group.ones)}


def _merge_magnitudes(group: AdapterGroup, ms: Mapping[str, Tensor], afters: Mapping[str, Tensor]) -> Tensor:
    """m per input of a fused weight: its norm times the gain common to all slices."""
    if not afters:
        return next(iter(ms.values()))
    whole = torch.stack([a.square() for a in afters.values()]).sum(0).sqrt()
    gains = torch.stack([torch.where(afters[n] > 0, ms[n] / afters[n], torch.nan) for n in ms])
    low, high = (torch.where(gains.isnan(), side * torch.inf, gains) for side in (1, -1))
    low, high = low.amin(0), high.amax(0)
    if ((high - low) > GAIN_TOLERANCE * high.abs()).any():
        raise group.error(
            f"is a slice of '{group.place.names[0]}', one weight in this format with one magnitude per input, and the slices "
            "need different gains",
            given=group.place.names[0],
            expected="gains",
        )
    return torch.where(high.isfinite(), high, 0.0) * whole


def delta_weight(adapter: Any) -> Tensor:
    """s·ΔW of an adapter with a `delta()` method, in double precision."""
    with torch.no_grad():
        found: Tensor = copy.deepcopy(adapter).double().delta() * adapter.scaling
    return found


def piece_delta(name: str, piece: SiteTensors, options: Mapping[str, Any]) -> Tensor:
    """s·ΔW of a piece, computed by the adapter that it describes."""
    from veneer.injection import methods

    adapter: Any = methods.get(name)(**{**options, "norm_axis": None}).build(piece.site)
    adapter.load_state_dict({key: t for key, t in piece.state.items() if key != "magnitude_delta"})
    return delta_weight(adapter)


def base_weight(tower: nn.Module, site: WeightSite) -> Tensor:
    """The base weight, or its slice, without any adapter; dequantized if it is quantized.

    Raises:
        VeneerError: it is on `meta` or in integers of an unknown library, or an attachment is merged into it.
    """
    tower_state = find_model_state(tower)
    if tower_state is not None and tower_state.merged:
        raise VeneerError(
            f"'{site.name}': '{tower_state.merged[-1].name}' is merged into the base, but DoRA's magnitudes need the original "
            "weights. Call its unmerge() first.",
            where=tower_state.merged[-1].name,
            given="merged",
        )
    weight = float_tensor(tower, site.path, site.param).detach()
    if not weight.is_floating_point() or weight.is_meta:
        message = f"'{site.name}': cannot compute the norm in {weight.dtype} on {weight.device}. Load the base model itself."
        raise VeneerError(message, where=site.name, given=weight.dtype)
    return weight if site.rows is None else weight[slice(*site.rows)]


def _norms(weight: Tensor, change: Delta, axis: Axis) -> tuple[Tensor, Tensor]:
    """‖W‖ per channel, and ‖s·ΔW‖ where ‖W‖ is zero (0 elsewhere)."""
    before = _channel_norms(weight.detach().double(), axis)
    after = torch.zeros_like(before)
    empty = before == 0
    if not weight.is_meta and empty.any():
        after[empty] = _channel_norms(change().detach().to(before), axis)[empty]
    return before, after


def _updated_norms(weight: Tensor, change: Delta) -> Tensor:
    """‖W + s·ΔW‖ per input."""
    return _channel_norms(weight.detach().double() + change().detach().to(weight.device, torch.float64), "input")


def _channel_norms(weight: Tensor, axis: Axis) -> Tensor:
    channels = 0 if axis == "output" else 1
    return torch.linalg.vector_norm(weight.movedim(channels, 0).flatten(1), dim=1)
