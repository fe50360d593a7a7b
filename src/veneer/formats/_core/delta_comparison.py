"""Compares the weight updates of adapters: bitwise, by their factors, or as matrices."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.functional.low_rank import product_norm
from veneer.injection import Attachment, SaveError
from veneer.injection.adapter_forms import LowRankAdapter, WeightAdapter
from veneer.injection.composition.merge import widened
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import ParamSite, WeightSite

from .._io.mapped_tensors import count_use
from .token_embeddings import token_embeddings

TOLERANCE = 1e-5  # relative to the largest element of ΔW: float32 error of factors multiplied in another order
ROUNDING = 2**-23  # relative to the largest element of W: float32 error of stored norms of W, such as DoRA's magnitudes
EMPTY = vars(nn.Module())
TEXTUAL_INVERSION = "textual_inversion"


def compare(before: Sequence[Attachment], after: Sequence[Attachment], target: Path) -> tuple[int, float]:
    """Compares ΔW = W' − W: number of adapted weights, and the largest difference relative to the largest ΔW (Frobenius norms).

    Each weight must agree within `TOLERANCE` of its ΔW. Adapters without a weight form must have identical tensors. Nothing is
    computed if all adapters are the same bitwise. Otherwise the factors of low-rank adapters are compared, without a matrix of
    the weight's size; of others ΔW at the base's W.

    Raises:
        SaveError: they differ.
    """
    was, now = _weight_adapters(before), _weight_adapters(after)
    largest = worst = 0.0
    places = dict.fromkeys([*was, *now])
    if was.keys() == now.keys() and all(_are_identical(was[place], now[place]) for place in places):
        places = {}
    for place in places:
        old, new = was.get(place, []), now.get(place, [])
        size, apart, allowed = _compare_weight(old, new)
        if not apart <= allowed:  # NaN is a difference, too
            name = (*old, *new)[0].site.name
            message = f"{target}: ΔW of '{name}' would differ by {apart:.3g}; its norm is {size:.3g}. Nothing was written."
            raise SaveError(message, file=target, where=name, given=apart, expected=size)
        largest, worst = max(largest, size), max(worst, apart)
    old_rest, new_rest = _other_tensors(before), _other_tensors(after)
    for key in dict.fromkeys([*old_rest, *new_rest]):
        if key not in old_rest or key not in new_rest or not torch.equal(old_rest[key].float(), new_rest[key].float()):
            raise SaveError(f"{target}: the tensor '{key}' would differ. Nothing was written.", file=target, where=key)
    return sum(map(len, was.values())), worst / largest if largest else 0.0


class _AdaptedWeight(NamedTuple):
    """An adapter with a weight form, its site and its model."""

    site: WeightSite | ParamSite
    adapter: Any
    tower: nn.Module


def _weight_adapters(attachments: Sequence[Attachment]) -> dict[tuple[str, str, str], list[_AdaptedWeight]]:
    """The adapters of each tensor, in the order in which they apply."""
    parts: dict[tuple[str, str, str], list[_AdaptedWeight]] = {}
    for attachment in attachments:
        for site, adapter in attachment.parts.values():
            if isinstance(site, (WeightSite, ParamSite)) and isinstance(adapter, WeightAdapter):
                part = _AdaptedWeight(site, adapter, attachment.towers[site.component])
                parts.setdefault((site.component, site.path, site.param), []).append(part)
    return parts


def _other_tensors(attachments: Sequence[Attachment]) -> dict[str, Tensor]:
    """All other trained tensors, by name."""
    compared = {part.site.name for parts in _weight_adapters(attachments).values() for part in parts}
    tokens = [each for a in attachments if a.method.name == TEXTUAL_INVERSION for each in token_embeddings(a)]
    rows_of_tokens = {f"{each.token} at {name}": rows for each in tokens for name, rows in each.rows.items()}
    others = [a for a in attachments if a.method.name != TEXTUAL_INVERSION]
    return rows_of_tokens | {k: t for a in others for k, t in a.state_dict().items() if k.rpartition(":")[0] not in compared}


def _are_identical(old: Sequence[_AdaptedWeight], new: Sequence[_AdaptedWeight]) -> bool:
    """True if the adapters are the same bitwise: class, site, options and tensors."""
    pairs = list(zip(old, new, strict=False))
    return len(old) == len(new) and all(a.site == b.site and _is_identical(a.adapter, b.adapter) for a, b in pairs)


def _is_identical(old: nn.Module, new: nn.Module) -> bool:
    if type(old) is not type(new) or _options(old) is None or _options(old) != _options(new):
        return False
    tensors, others = ({**dict(a.named_parameters()), **dict(a.named_buffers())} for a in (old, new))
    count_use(*tensors.values(), *others.values())
    return tensors.keys() == others.keys() and all(
        t.dtype == others[name].dtype and torch.equal(t, others[name]) for name, t in tensors.items()
    )


def _options(adapter: nn.Module) -> dict[str, Any] | None:
    """Attributes of an adapter beside its site and tensors; None if they are not all numbers, strings or None."""
    own = {k: v for k, v in vars(adapter).items() if k not in EMPTY and k not in ("site", "call")}
    simple = all(v is None or isinstance(v, (bool, int, float, str)) for v in own.values())
    return own if simple and not adapter._modules else None


def _compare_weight(old: Sequence[_AdaptedWeight], new: Sequence[_AdaptedWeight]) -> tuple[float, float, float]:
    """Norm of the old ΔW, of its difference to the new one, and the largest difference that rounding explains."""
    rows, width = _base_shape(*old, *new)[0], math.prod(_base_shape(*old, *new)[1:])
    factors, others = _sum_of_factors(old, rows, width), _sum_of_factors(new, rows, width)
    if factors is not None and others is not None:
        (left, right), (other_left, other_right) = factors, others
        size = product_norm(left, right)
        count_use(left, right)
        if torch.equal(right, other_right):
            apart = product_norm(left - other_left, right)
        else:
            apart = product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right]))
        return size, apart, TOLERANCE * size
    weight = _base_weight(*old, *new)
    before, after = _apply(weight, old), _apply(weight, new)
    size, apart = float((before - weight).norm()), float((before - after).norm())
    return size, apart, TOLERANCE * size + ROUNDING * float(weight.norm())


@torch.no_grad()
def _sum_of_factors(parts: Sequence[_AdaptedWeight], rows: int, width: int) -> tuple[Tensor, Tensor] | None:
    """C (rows, rank) and D (rank, width) in double precision with ΔW = C D of all parts; None if one has no factors."""
    left, right = [torch.zeros(rows, 0, dtype=torch.float64)], [torch.zeros(0, width, dtype=torch.float64)]
    for site, adapter, _ in parts:
        if not isinstance(adapter, LowRankAdapter) or (isinstance(site, WeightSite) and site.groups > 1):
            return None
        module: Any = adapter
        with widened(module, torch.float64):
            own_left, own_right = (t[0].cpu() for t in adapter.factors())
        padded = torch.zeros(rows, own_left.shape[1], dtype=torch.float64)
        padded[slice(*site.rows) if site.rows else slice(None)] = own_left
        left.append(padded)
        right.append(own_right.clone())
    return torch.cat(left, 1), torch.cat(right)


def _base_shape(first: _AdaptedWeight, *others: _AdaptedWeight) -> tuple[int, ...]:
    """Shape of the base tensor, as far as the adapters reach."""
    site = first.site
    shape = site.weight_shape if isinstance(site, WeightSite) else site.shape
    return max(part.site.rows[1] if part.site.rows else shape[0] for part in (first, *others)), *shape[1:]


def _base_weight(*parts: _AdaptedWeight) -> Tensor:
    """The base tensor in double precision; a random tensor of the same shape if it is quantized or on the meta device."""
    site = parts[0].site
    tensor = base_tensor(parts[0].tower, site.path, site.param)
    if tensor.is_floating_point() and not tensor.is_meta:
        return tensor.detach().double().cpu()
    return torch.randn(_base_shape(*parts), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _apply(weight: Tensor, parts: Sequence[_AdaptedWeight]) -> Tensor:
    """W after the weight form of each adapter on its rows, in double precision."""
    after = weight.clone()
    for site, adapter, _ in parts:
        shared = {id(value): value for value in vars(adapter).values() if isinstance(value, nn.Module)}  # references, not copied
        rows = after[slice(*site.rows)] if site.rows else after
        rows.copy_(copy.deepcopy(adapter, shared).double().cpu().weight(rows))
    return after
