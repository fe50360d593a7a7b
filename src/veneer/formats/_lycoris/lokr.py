"""LoKr in the LyCORIS format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.functional.kronecker import kron_factors
from veneer.injection import SaveError
from veneer.injection.sites import WeightSite

from .._core.dora_magnitudes import SCALE, add_magnitudes, delta_weight, magnitude_tensors, piece_delta
from .._core.lora_reader import alpha_of
from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors, Spans, has_row_order, is_aligned, put, spans, take
from .lora import decomposition

LEFT, RIGHT = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")
CORE = "lokr_t2"


@dataclass(frozen=True)
class KroneckerFactors:
    """s·(C ⊗ D): `left` is C (up, uq), or its up factor with `left_down`; `right` is D (vp, vq, …), or with `right_down`."""

    left: Tensor
    left_down: Tensor | None
    right: Tensor
    right_down: Tensor | None
    scaling: float

    def rows(self, row_spans: Spans) -> KroneckerFactors | None:
        """The factors of the given rows of C ⊗ D; None if these are neither whole blocks nor all inside one block."""
        side = len(self.right)
        if is_aligned(row_spans, side):
            return replace(self, left=take(self.left, row_spans, side))
        blocks = {row // side for start, stop in row_spans for row in (start, stop - 1)}
        if len(blocks) > 1:
            return None
        (block,) = blocks
        inside = [(start - block * side, stop - block * side) for start, stop in row_spans]
        return replace(self, left=self.left[block : block + 1], right=take(self.right, inside))

    def expanded(self, row_spans: Spans) -> KroneckerFactors:
        """Any rows of C ⊗ D exactly, as 1 ⊗ D': D' = (C ⊗ B)[rows] (I ⊗ A), of rank uq·r if D = B A has rank r, else full."""
        left = self.left.double() if self.left_down is None else self.left.double() @ self.left_down.double()
        right, down, inputs = self.right.double().flatten(1), self.right_down, left.shape[1]
        one, count = left.new_ones(1, 1, dtype=torch.float32), sum(stop - start for start, stop in row_spans)
        if down is not None:
            rank, width = inputs * len(down), inputs * down.flatten(1).shape[1]
            if rank * (count + width) < count * width:
                wide = torch.kron(torch.eye(inputs, dtype=torch.float64), down.double().flatten(1))
                rows = take(torch.kron(left, right), row_spans)
                return KroneckerFactors(one, None, rows.to(torch.float32), wide.to(torch.float32), self.scaling)
            right = right @ down.double().flatten(1)
        rows = take(torch.kron(left, right), row_spans) * self.scaling
        return KroneckerFactors(one, None, rows.to(torch.float32), None, 1.0)


class LoKrCodec(Codec):
    """`lokr_w1` C (up, uq), `lokr_w2` D (vp, vq[, k, k]), `alpha`; ΔW = s·(C ⊗ D), d_out = up·vp, d_in = uq·vq.

    A low-rank factor is `…_a` (rows, r) times `…_b` (r, columns[·k·k]); then s = alpha / r; if both factors are full, s = 1. With
    `lokr_t2` (r, r, k, k), D is a Tucker product of `lokr_w2_a` (r, vp) and `lokr_w2_b` (r, vq); it is read as a full D.
    A fused projection is split if its slices are whole blocks of vp rows, or lie inside one block; otherwise each slice becomes
    one factor D with C = 1, exact but larger: of rank uq·r, or a full matrix. With `dora_scale`, W + ΔW is decomposed, as in
    `DoRACodec`.
    """

    method: ClassVar[str] = "lokr"
    algo: ClassVar[str] = "lokr"
    suffixes: ClassVar[tuple[str, ...]] = (*LEFT, *RIGHT, CORE, SCALE)
    groups: ClassVar[bool] = True

    def matches(self, shapes: Shapes) -> bool:
        return any(part.startswith("lokr_") for part in shapes)

    def rank(self, shapes: Shapes) -> int | None:
        return next((shapes[part][0] for part in (LEFT[2], RIGHT[2]) if shapes.get(part)), None)

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        whole, rows = _factors(module), spans(module.place)
        found = {name: part for name, row_spans in rows.items() if (part := whole.rows(row_spans)) is not None}
        if len(found) < len(rows):
            if module.first.kernel:
                why = f"is LoKr with blocks of {len(whole.right)} rows, which do not align with its slices"
                raise module.error(why, given=len(whole.right))
            found = {name: whole.expanded(row_spans) for name, row_spans in rows.items()}
            module.notes.append("LoKr blocks do not align with the slices of a fused projection; loaded as one matrix per slice")
        sites, all_of = module.place.sites, len(rows) == 1 or SCALE in module.parts
        some = [s for s in sites if all_of or (found[s.name].left.any() and found[s.name].right.any())] or sites[:1]
        pieces = [_piece(site, found[site.name]) for site in some]
        if SCALE in module.parts:
            return add_magnitudes(module, pieces, lambda p: piece_delta("lokr", p, _explicit_options(p)))
        return pieces

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        return self._factors(group) | magnitude_tensors(group, delta_weight)

    def _factors(self, group: AdapterGroup) -> dict[str, Tensor]:
        factors = {name: _adapter_factors(adapter) for name, adapter in group.adapters.items()}
        found = _merge_factors(group, factors)
        full = found.left_down is None and found.right_down is None
        rank = 1 if full else len(found.right_down if found.left_down is None else found.left_down)  # type: ignore[arg-type]
        scaling = found.scaling
        if full or not scaling:  # s = 1 if both are full; tools interpret an alpha of 0 in two ways
            found, scaling = replace(found, right=found.right * scaling if scaling != 1 else found.right), 1.0
        tensors = _name_factor(LEFT, found.left, found.left_down) | _name_factor(RIGHT, found.right, found.right_down)
        return {**tensors, "alpha": torch.tensor(float(scaling * rank))}

    @staticmethod
    def can_merge(group: AdapterGroup) -> bool:
        """True if the adapters of a layer form a single Kronecker product."""
        try:
            _merge_factors(group, {name: _adapter_factors(adapter) for name, adapter in group.adapters.items()})
        except SaveError:
            return False
        return True

    def config(self, pieces: Sequence[SiteTensors]) -> dict[str, Any]:
        """The `factor` and `rank` that reproduce the most splits, and explicit options by site for the others."""
        method = _method()
        ranks = Counter(r for p in pieces for r in {p.options["left"], p.options["right"]} - {None})
        rank = ranks.most_common(1)[0][0] if ranks else None
        alphas = Counter(p.options["alpha"] for p in pieces if p.options["alpha"] is not None)
        both = rank is not None and any(p.options["left"] for p in pieces)
        alpha = alphas.most_common(1)[0][0] if alphas else None
        axis = Counter(p.options["norm_axis"] for p in pieces).most_common(1)[0][0]
        tried = [
            method(factor=factor, rank=rank, alpha=alpha, decompose_both=both, norm_axis=axis)
            for factor in dict.fromkeys([-1, *(side for p in pieces for side in p.options["sides"])])
        ]
        best = max(tried, key=lambda m: sum(_reproduces(m, p) for p in pieces))
        own = {f"name:{p.site.name}": _explicit_options(p) for p in pieces if not _reproduces(best, p)}
        return {**best.config(), "by_site": own}

    def args(self, group: AdapterGroup) -> dict[str, str]:
        splits = [a.split for a in group.adapters.values()]
        full = all(s.left_rank is None and s.right_rank is None for s in splits)
        both = any(s.left_rank is not None for s in splits)
        form = {"full_matrix": "True"} if full else {"decompose_both": "True"} if both else {}
        return form | decomposition(group)


def _factors(module: LycorisModule) -> KroneckerFactors:
    """The factors of a module.

    Raises:
        LoadError: the factors do not match the weight's dimensions, or have two ranks.
    """
    parts, site = module.parts, module.first
    left, left_down, first = _factor(module, LEFT)
    right, right_down, second = _tucker(module) if CORE in parts else _factor(module, RIGHT)
    if first and second and first != second and "alpha" in parts:
        why = f"has factors of rank {first} and {second}; tools disagree on which of them divides alpha"
        raise module.error(why, given=(first, second))
    rank = first or second
    scaling = alpha_of(module.file, module.name, parts.get("alpha"), rank) / rank if rank else 1.0
    if CORE in parts:
        right, scaling = right * scaling, 1.0
    width, uq = site.weight_shape[1], (left if left_down is None else left_down).shape[1]
    columns = (right if right_down is None else right_down).flatten(1).shape[1]
    one = right if right_down is None else right_down
    module.expect(
        has_row_order(one, (width // max(uq, 1), *site.kernel)) and has_row_order(left), "two-dimensional factors, or a kernel's"
    )
    sides = len(left) * len(right) == module.rows and uq * columns == math.prod(site.weight_shape[1:])
    module.expect(sides and width % uq == 0, "factors whose dimensions multiply to the weight's")
    shape = (width // uq, *site.kernel)
    if right_down is None:
        return KroneckerFactors(left, left_down, right.reshape(len(right), *shape), None, scaling)
    return KroneckerFactors(left, left_down, right, right_down.reshape(len(right_down), *shape), scaling)


def _factor(module: LycorisModule, names: tuple[str, str, str]) -> tuple[Tensor, Tensor | None, int | None]:
    """(up, down, rank) of one factor; (matrix, None, None) if it is full."""
    parts, (name, up, down) = module.parts, names
    one = (name in parts) != (up in parts and down in parts)
    module.expect(one and all(parts[p].ndim > 1 for p in names if p in parts), f"{name}, or {up} and {down}")
    if name in parts:
        return parts[name], None, None
    rows, columns = parts[up].flatten(1), parts[down]
    module.expect(rows.shape[1] == len(columns) > 0, f"{up} and {down} of one rank")
    return rows, columns, len(columns)


def _tucker(module: LycorisModule) -> tuple[Tensor, None, int]:
    """D multiplied out, and the rank that divides alpha."""
    names = (CORE, *RIGHT[1:])
    module.expect(all(p in module.parts for p in names) and RIGHT[0] not in module.parts, f"all of {', '.join(names)}")
    core, rows, columns = (module.parts[p].double() for p in names)
    rank = len(columns)
    module.expect(core.ndim > 2 and core.shape[:2] == (len(rows), rank) and rank > 0, f"a core of rank {rank}")
    return torch.einsum("pq...,po,qi->oi...", core, rows, columns), None, rank


def _piece(site: WeightSite, found: KroneckerFactors) -> SiteTensors:
    """Options of a site as `config` compares them: shape of C, both ranks, and alpha if a factor is of low rank."""
    low = {"left": found.left_down, "right": found.right_down}
    ranks = {name: None if down is None else len(down) for name, down in low.items()}
    rank = next((r for r in ranks.values() if r is not None), None)
    scaling, right = (found.scaling, found.right) if rank is not None else (1.0, found.right * found.scaling)
    state = {
        "left" if found.left_down is None else "left_up": found.left,
        "right" if found.right_down is None else "right_up": right,
    }
    state |= {f"{name}_down": down for name, down in low.items() if down is not None}
    uq = (found.left if found.left_down is None else found.left_down).shape[1]
    options = {"sides": (len(found.left), uq), **ranks, "alpha": None if rank is None else scaling * rank, "norm_axis": None}
    return SiteTensors(site, options, state)


def _reproduces(method: Any, piece: SiteTensors) -> bool:
    """True if a config without per-site options gives this piece's split and scale."""
    site, options = piece.site, piece.options
    (up, _), (uq, _) = kron_factors(site.d_out, method.factor), kron_factors(site.weight_shape[1], method.factor)
    split = method.split(site)
    same = (
        (up, uq) == options["sides"]
        and method.norm_axis == options["norm_axis"]
        and (split.left_rank, split.right_rank) == (options["left"], options["right"])
    )
    full = options["left"] is None and options["right"] is None
    return bool(same and (full or (method.alpha or method.rank) == options["alpha"]))


def _explicit_options(piece: SiteTensors) -> dict[str, Any]:
    """Options that fix a piece's split independently of the others."""
    left, right = piece.options["left"], piece.options["right"]
    low = "both" if left and right else "left" if left else "right" if right else "none"
    return {
        "sides": piece.options["sides"],
        "low": low,
        "rank": left or right,
        "alpha": piece.options["alpha"],
        "decompose_both": False,
        "norm_axis": piece.options["norm_axis"],
    }


def _adapter_factors(adapter: Any) -> KroneckerFactors:
    low = [getattr(adapter, f"{n}_down", None) if getattr(adapter, n) is None else None for n in ("left", "right")]
    rows = [
        getattr(adapter, n) if d is None else getattr(adapter, f"{n}_up") for n, d in zip(("left", "right"), low, strict=True)
    ]
    left_down, right_down = (None if d is None else d.detach() for d in low)
    return KroneckerFactors(rows[0].detach(), left_down, rows[1].detach(), right_down, adapter.scaling)


def _merge_factors(group: AdapterGroup, factors: Mapping[str, KroneckerFactors]) -> KroneckerFactors:
    """The factors of all rows: blocks of one D stacked, or rows of one block.

    Raises:
        SaveError: the slices of a fused projection do not form a single Kronecker product.
    """
    place, first = group.place, next(iter(factors.values()))
    if len(place.sites) == 1 and not place.swapped:
        return first
    same = [
        n
        for n in ("left", "left_down", "right", "right_down", "scaling")
        if all(_equal(getattr(f, n), getattr(first, n)) for f in factors.values())
    ]
    side = len(first.right)
    if {"left_down", "right", "right_down", "scaling"} <= set(same) and all(s.d_out % side == 0 for s in place.sites):
        rows = {
            s.name: factors[s.name].left if s.name in factors else first.left.new_zeros(s.d_out // side, first.left.shape[1])
            for s in place.sites
        }
        if not place.swapped or len(first.left) % 2 == 0:
            return replace(first, left=put(place, rows))
    if {"left", "left_down", "right_down", "scaling"} <= set(same) and len(first.left) == 1 and len(factors) == len(place.sites):
        return replace(first, right=put(place, {name: f.right for name, f in factors.items()}))
    why = f"is a slice of '{place.names[0]}', one weight in this format, and the slices do not form one Kronecker product"
    raise group.error(why, given=place.names[0], expected="factors")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a is b or a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


def _name_factor(names: tuple[str, str, str], rows: Tensor, columns: Tensor | None) -> dict[str, Tensor]:
    name, up, down = names
    return {name: rows} if columns is None else {up: rows, down: columns.flatten(1)}


def _method() -> Any:
    from veneer.injection import methods

    return methods.get("lokr")
