"""State with which an adapter reproduces another one of its method, of other ranks, scales or blocks, at the same site.

All are exact: smaller factors are zero-padded into larger ones, and the ratio of the scales is folded into one factor, so
that the adapter keeps its shapes and hyperparameters. None instead of an adapter means no update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.functional.batched_low_rank import add_products
from veneer.functional.cayley import clip_norm, skew
from veneer.functional.padding import merge_blocks, pad_zeros
from veneer.injection.errors import OptionError

State = dict[str, Tensor]


def lora_state(arena: Any, other: Any | None) -> State:
    """[A; 0] and (s_other / s)·[B, 0], group by group; a learned magnitude unchanged.

    Raises:
        ValueError: the rank is too small, or the form differs.
    """
    state = {key: torch.zeros_like(tensor) for key, tensor in arena.state_dict().items()}
    if other is None:
        return state
    tucker = "core" in state
    if tucker and not hasattr(other, "core"):
        message = "it has no core, but the attachment does; attach with tucker=False, which can load both"
        raise OptionError(message, option="tucker", given=True, expected=False)
    embedding, groups = arena.site.kind == "embedding", arena.pairs
    rank = arena.down.shape[1 if embedding else 0]
    if other.pairs != groups and (tucker or groups == 1 or not hasattr(other, "pair")):
        kinds = ("one pair of factors per group", "one pair of factors for all groups")
        message = f"it has {kinds[other.pairs == 1]}, not {kinds[groups == 1]}; attach with its rank"
        raise OptionError(message, option="rank", given=groups, expected=other.pairs)
    down, up = (other.down, other.up) if tucker or not hasattr(other, "pair") else _matching_pair(other, groups)
    try:
        state["down"] = pad_zeros(down, rank, 1 if embedding else 0, groups)
        state["up"] = pad_zeros(_rescale(up, other.scaling, arena.scaling), arena.up.shape[1], 1)
        if tucker:
            state["core"] = pad_zeros(pad_zeros(other.core, rank, 0, groups), rank // groups, 1)
    except ValueError as error:
        expected = down.shape[1 if embedding else 0]
        raise OptionError(
            f"{error}; attach with rank={expected} or more", option="rank", given=rank, expected=expected
        ) from error
    return _add_magnitudes(state, arena, other)


def _add_magnitudes(state: State, arena: Any, other: Any) -> State:
    """The state with the other's learned magnitudes.

    Raises:
        ValueError: the norm axes differ, or only one has magnitudes.
    """
    here, there = (getattr(adapter, "norm_axis", None) for adapter in (arena, other))
    if here != there:
        message = f"its norm_axis is {there}, not {here}; attach with norm_axis={there!r}"
        raise OptionError(message, option="norm_axis", given=here, expected=there)
    return {**state, "magnitude_delta": other.magnitude_delta} if "magnitude_delta" in state else state


def _matching_pair(other: Any, groups: int) -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = other.own_pair() if other.pairs == groups else other.pair()
    return pair


def loha_state(arena: Any, other: Any | None) -> State:
    """Both pairs of factors as in `lora_state`, the scale in the second.

    Raises:
        ValueError: the rank is too small, or the form differs.
    """
    state = {key: torch.zeros_like(tensor) for key, tensor in arena.state_dict().items()}
    if other is None:
        return state
    found, state = other.state_dict(), _add_magnitudes(state, arena, other)
    found.pop("magnitude_delta", None)
    if found.keys() != state.keys() - {"magnitude_delta"}:
        message = "only one of the two has cores; attach with its value of tucker"
        raise OptionError(message, option="tucker", given="core1" in state, expected="core1" in found)
    rank = arena.up1.shape[1]
    found["up2"] = _rescale(other.up2, other.scaling, arena.scaling)
    try:
        for key, tensor in found.items():
            state[key] = pad_zeros(tensor, rank, 1 if key.startswith("up") else 0)
            if key.startswith("core"):
                state[key] = pad_zeros(state[key], rank, 1)
    except ValueError as error:
        expected = other.up1.shape[1]
        raise OptionError(
            f"{error}; attach with rank={expected} or more", option="rank", given=rank, expected=expected
        ) from error
    return state


def lora_batched(adapters: Sequence[tuple[Any, float] | None], x: Tensor, y: Tensor, overwrite: bool) -> Tensor | None:
    """Each sample's B A x in one batched product, with its scale and strength in B; zeros for samples without an adapter."""
    enabled = [one[0] for one in adapters if one is not None]
    if any(a.site.kind != "linear" or hasattr(a, "core") or (a.dropout and a.training) for a in enabled):
        return None
    pairs = [None if one is None else (*one[0].pair(), one[0].strength * (one[0].scaling * one[1])) for one in adapters]
    down, up = enabled[0].pair()
    downs = [torch.zeros_like(down) if pair is None else pair[0] for pair in pairs]
    ups = [torch.zeros_like(up) if pair is None else pair[1] * pair[2] for pair in pairs]
    return add_products(x, y, downs, ups, overwrite)


def lokr_state(arena: Any, other: Any | None) -> State:
    """The same C and D: low-rank factors padded, or multiplied out into full ones; scales in D.

    Raises:
        ValueError: other shapes, or the rank is too small.
    """
    if other is None:
        return {key: torch.zeros_like(tensor) for key, tensor in arena.state_dict().items()}
    here, there = ((s.up, s.vp, s.uq, s.vq) for s in (arena.split, other.split))
    if here != there:
        sides = f"C {there[0]}×{there[2]} and D {there[1]}×{there[3]}"
        message = f"its factors are {sides}, not {here[0]}×{here[2]} and {here[1]}×{here[3]}; attach with its factor"
        raise OptionError(message, option="factor", given=tuple(here), expected=tuple(there))
    state: State = {}
    for side, scale in (("left", 1.0), ("right", other.scaling)):
        ratio = 1.0 if side == "left" else arena.scaling
        full = getattr(other, side)
        if getattr(arena, side) is not None:
            state[side] = _rescale(_product(other, side) if full is None else full, scale, ratio)
        elif full is not None:
            message = f"its {side} factor is full, but the attachment's is of low rank; attach with rank=None"
            raise OptionError(message, option="rank", given=side, expected=None)
        else:
            rank = getattr(arena, f"{side}_down").shape[0]
            state[f"{side}_up"] = pad_zeros(_rescale(getattr(other, f"{side}_up"), scale, ratio), rank, 1)
            state[f"{side}_down"] = pad_zeros(getattr(other, f"{side}_down"), rank, 0)
    if "magnitude_delta" in arena.state_dict():
        state["magnitude_delta"] = torch.zeros_like(arena.magnitude_delta)
    return _add_magnitudes(state, arena, other)


def rotation_state(arena: Any, other: Any | None) -> State:
    """Blocks of Q on the diagonals of larger ones, already constrained to the other's radius; magnitudes of 1 if it has none.

    Raises:
        ValueError: incompatible blocks, magnitudes that this adapter does not have, or a Q outside its radius.
    """
    state = {key: torch.zeros_like(tensor) for key, tensor in arena.state_dict().items()}
    if arena.magnitude is not None:
        state["magnitude"] += 1
    if other is None:
        return state
    if hasattr(other, "rotations") is not hasattr(arena, "rotations"):
        raise OptionError(
            "it rotates the other side of the weight; attach with its side", option="side", given=hasattr(arena, "rotations")
        )
    terms = getattr(other, "terms", None)
    if terms != getattr(arena, "terms", None):
        message = f"it has neumann_terms={terms}, but the attachment has another value; attach with neumann_terms={terms}"
        raise OptionError(message, option="neumann_terms", given=getattr(arena, "terms", None), expected=terms)
    if other.magnitude is not None:
        if arena.magnitude is None:
            message = "it has learned magnitudes, but the attachment has none; attach with rescale=True"
            raise OptionError(message, option="rescale", given=False, expected=True)
        state["magnitude"] = other.magnitude
    entries = other.skew if other.radius is None else _constrained_entries(other)
    if entries.ndim == 2:
        try:
            entries = merge_blocks(entries, other.size, arena.size, len(arena.skew))
        except ValueError as error:
            raise OptionError(str(error), option="block_size", given=arena.size, expected=other.size) from error
    if entries.shape != arena.skew.shape:
        given, expected = tuple(arena.skew.shape), tuple(entries.shape)
        message = f"its blocks are {expected}, not {given}; attach with its options"
        raise OptionError(message, option="block_size", given=given, expected=expected)
    norm = skew(entries, arena.size).flatten(-2).norm(dim=-1)
    if arena.radius is not None and norm.numel() and norm.max() > arena.radius * (1 + 1e-6):
        message = f"its Q has norm {norm.max():.3g}, more than the radius {arena.radius:.3g}; attach with coft=None"
        raise OptionError(message, option="coft", given=arena.radius, expected=None)
    state["skew"] = entries
    return state


def _rescale(factor: Tensor, there: float, here: float) -> Tensor:
    """The factor times the ratio of the scales; unchanged if they are equal."""
    if there == here:
        return factor
    if here == 0:
        message = "the attachment's own scale is 0, so it has no effect; attach with another alpha"
        raise OptionError(message, option="alpha", given=here)
    return (factor.double() * (there / here)).to(factor.dtype)


def _product(adapter: Any, side: str) -> Tensor:
    up, down = getattr(adapter, f"{side}_up"), getattr(adapter, f"{side}_down")
    product: Tensor = (up @ down.flatten(1)).unflatten(1, down.shape[1:])
    return product


def _constrained_entries(adapter: Any) -> Tensor:
    """The entries of Q after its constraint."""
    q = clip_norm(skew(adapter.skew, adapter.size), adapter.radius)
    rows, columns = torch.triu_indices(adapter.size, adapter.size, 1)
    return q[..., rows, columns]
