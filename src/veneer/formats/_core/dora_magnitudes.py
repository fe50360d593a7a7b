"""DoRA's magnitudes: files hold m, veneer holds m − ‖W‖; the base's own weight stands between the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.injection import VeneerError
from veneer.injection.attachment.model_state import peek
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import WeightSite

from .._lycoris.codec import Group, Module, Piece, put, spans, take

SCALE = "dora_scale"
Axis = Literal["output", "input"]
Change = Callable[[], Tensor]  # s·ΔW in the weight's shape
NEAR = 1e-6  # relative: how far the gains of a fused projection's slices may be apart to count as one


def magnitude_delta(magnitude: Tensor, weight: Tensor, change: Change, axis: Axis = "output") -> Tensor:
    """m − ‖W‖ per channel, for a file's m; where a channel of W is zero, m / ‖s·ΔW‖ − 1, as `dora` scales it by 1 + it.

    Computed in double precision, because m and ‖W‖ are nearly alike.

    Args:
        magnitude: m, in any shape. `weight`: W, (d_out, …), the base's own. `change`: s·ΔW of the same layer.
    Returns:
        (d_out,), or (d_in / groups,) on the input axis.
    """
    before, after = _norms(weight, change, axis)
    m = magnitude.detach().flatten().to(before)
    return torch.where(before > 0, m - before, torch.where(after > 0, m / after, 1.0) - 1).to(torch.float32)


def magnitude(delta: Tensor, weight: Tensor, change: Change, axis: Axis = "output") -> Tensor:
    """m per channel, in double precision: what `magnitude_delta` is the inverse of."""
    before, after = _norms(weight, change, axis)
    given = delta.detach().flatten().to(before)
    return torch.where(before > 0, before + given, (1 + given) * after)


def axis_of(module: Module) -> Axis:
    """The axis of a file's magnitudes, by their shape: (d_out, 1, …) or (1, d_in / groups, …).

    Raises:
        LoadError: they are neither.
    """
    m, width = module.parts[SCALE], module.first.weight_shape[1]
    if m.ndim and m.numel() == m.shape[0] == module.rows:
        return "output"
    module.expect(
        m.ndim > 1 and m.numel() == m.shape[1] == width, f"{SCALE} ({module.rows}, 1) of outputs, or (1, {width}) of inputs"
    )
    return "input"


def decomposed(module: Module, pieces: list[Piece], change: Callable[[Piece], Tensor]) -> list[Piece]:
    """The pieces of all sites of a module with its magnitudes.

    Args:
        pieces: one a site. `change`: s·ΔW of a piece, in the weight's shape.
    """
    axis = axis_of(module)
    weights = {p.site.name: base_weight(module.towers[p.site.component], p.site) for p in pieces}
    changes: dict[str, Change] = {p.site.name: partial(change, p) for p in pieces}
    given = _by_site(module, axis, weights, changes)
    return [
        Piece(
            p.site,
            {**p.options, "norm_axis": axis},
            {**p.state, "magnitude_delta": magnitude_delta(given[name], weights[name], changes[name], axis)},
        )
        for p in pieces
        for name in [p.site.name]
    ]


def _by_site(module: Module, axis: Axis, weights: Mapping[str, Tensor], changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """m of each site. A slice of a fused projection has its own norm of an input in the place of the whole's: same W'."""
    m = module.parts[SCALE]
    if axis == "output":
        return {name: take(m, rows) for name, rows in spans(module.place).items() if name in weights}
    if len(module.place.sites) == 1:
        return dict.fromkeys(weights, m)
    squares = {name: _after(weights[name], changes[name]).square() for name in weights}
    whole = torch.stack([*squares.values()]).sum(0)
    flat = m.flatten().to(whole)
    return {name: flat * (square / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt() for name, square in squares.items()}


def written(group: Group, change: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The magnitudes of a group as one tensor; nothing where its adapters have none.

    Args:
        change: s·ΔW of an adapter, in the weight's shape.
    Raises:
        SaveError: slices of a fused projection have other axes, or gains of inputs, so that they are not of this form together.
    """
    axes = {a.norm_axis for a in group.adapters.values()}
    if len(axes) > 1:
        why = f"is part of '{group.place.names[0]}', one weight in this layout, whose slices have norms of two axes"
        raise group.refuse(why, given=group.place.names[0], expected="norm_axis")
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
            afters[site.name] = _after(weight, shift)
    if axis == "output":
        return {SCALE: put(group.place, ms).to(torch.float32).view(-1, 1, *group.ones)}
    return {SCALE: _joined(group, ms, afters).to(torch.float32).view(1, -1, *group.ones)}


def _joined(group: Group, ms: Mapping[str, Tensor], afters: Mapping[str, Tensor]) -> Tensor:
    """m of the inputs of a whole place: its norm times the gain that all slices share."""
    if not afters:
        return next(iter(ms.values()))
    whole = torch.stack([a.square() for a in afters.values()]).sum(0).sqrt()
    gains = torch.stack([torch.where(afters[n] > 0, ms[n] / afters[n], torch.nan) for n in ms])
    low, high = (torch.where(gains.isnan(), side * torch.inf, gains) for side in (1, -1))
    low, high = low.amin(0), high.amax(0)
    if ((high - low) > NEAR * high.abs()).any():
        raise group.refuse(
            f"is part of '{group.place.names[0]}', one weight in this layout with one magnitude per input, and its slices have "
            "other gains",
            given=group.place.names[0],
            expected="gains",
        )
    return torch.where(high.isfinite(), high, 0.0) * whole


def change(adapter: Any) -> Tensor:
    """s·ΔW of an adapter that has `delta()`, in double precision."""
    with torch.no_grad():
        found: Tensor = copy.deepcopy(adapter).double().delta() * adapter.scaling
    return found


def change_of(name: str, piece: Piece, options: Mapping[str, Any]) -> Tensor:
    """s·ΔW of a piece of a method: that of the adapter which it describes."""
    from veneer.injection import methods

    adapter: Any = methods.get(name)(**{**options, "norm_axis": None}).build(piece.site)
    adapter.load_state_dict({key: t for key, t in piece.state.items() if key != "magnitude_delta"})
    return change(adapter)


def base_weight(tower: nn.Module, site: WeightSite) -> Tensor:
    """The base's own (slice of a) weight, without any adapter.

    Raises:
        VeneerError: it is quantised, or something is merged into it, so that its norm is not the base's.
    """
    ledger = peek(tower)
    if ledger is not None and ledger.merged:
        raise VeneerError(
            f"'{site.name}': '{ledger.merged[-1].name}' is merged into the base, whose norms DoRA's magnitudes are told by. Call "
            "its unmerge() first.",
            where=ledger.merged[-1].name,
            given="merged",
        )
    weight = base_tensor(tower, site.path, site.param).detach()
    if not weight.is_floating_point():
        message = f"'{site.name}': the norm of a quantised weight is not known. Load the base unquantised."
        raise VeneerError(message, where=site.name, given=weight.dtype)
    return weight if site.rows is None else weight[slice(*site.rows)]


def _norms(weight: Tensor, change: Change, axis: Axis) -> tuple[Tensor, Tensor]:
    """‖W‖ per channel, and ‖s·ΔW‖ where that is zero (elsewhere 0)."""
    before = _channels(weight.detach().double(), axis)
    after = torch.zeros_like(before)
    empty = before == 0
    if not weight.is_meta and empty.any():
        after[empty] = _channels(change().detach().to(before), axis)[empty]
    return before, after


def _after(weight: Tensor, change: Change) -> Tensor:
    """‖W + s·ΔW‖ per input."""
    return _channels(weight.detach().double() + change().detach().to(weight.device, torch.float64), "input")


def _channels(weight: Tensor, axis: Axis) -> Tensor:
    channels = 0 if axis == "output" else 1
    return torch.linalg.vector_norm(weight.movedim(channels, 0).flatten(1), dim=1)
