"""LoKr in LyCORIS' layout."""

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

from .._core.dora_magnitudes import SCALE, change, change_of, decomposed, written
from .._core.lora_reader import alpha_of
from .codec import Codec, Group, Module, Piece, Shapes, Spans, aligned, put, spans, straight, take
from .lora import decomposition

LEFT, RIGHT = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")
CORE = "lokr_t2"


@dataclass(frozen=True)
class Factors:
    """s·(C ⊗ D): `left` is C (up, uq), or its rows' factor with `left_down`; `right` D (vp, vq, …), or that with `right_down`."""

    left: Tensor
    left_down: Tensor | None
    right: Tensor
    right_down: Tensor | None
    scaling: float

    def rows(self, wanted: Spans) -> Factors | None:
        """The factors of these rows of C ⊗ D; None where they are neither whole blocks, nor all inside one."""
        side = len(self.right)
        if aligned(wanted, side):
            return replace(self, left=take(self.left, wanted, side))
        blocks = {row // side for start, stop in wanted for row in (start, stop - 1)}
        if len(blocks) > 1:
            return None
        (block,) = blocks
        inside = [(start - block * side, stop - block * side) for start, stop in wanted]
        return replace(self, left=self.left[block : block + 1], right=take(self.right, inside))

    def expanded(self, wanted: Spans) -> Factors:
        """Any rows of C ⊗ D exactly, as 1 ⊗ D': D' = (C ⊗ B)[rows] (I ⊗ A) of rank uq·r for a D = B A of rank r, else full."""
        left = self.left.double() if self.left_down is None else self.left.double() @ self.left_down.double()
        right, down, inputs = self.right.double().flatten(1), self.right_down, left.shape[1]
        one, count = left.new_ones(1, 1, dtype=torch.float32), sum(stop - start for start, stop in wanted)
        if down is not None:
            rank, width = inputs * len(down), inputs * down.flatten(1).shape[1]
            if rank * (count + width) < count * width:
                wide = torch.kron(torch.eye(inputs, dtype=torch.float64), down.double().flatten(1))
                rows = take(torch.kron(left, right), wanted)
                return Factors(one, None, rows.to(torch.float32), wide.to(torch.float32), self.scaling)
            right = right @ down.double().flatten(1)
        rows = take(torch.kron(left, right), wanted) * self.scaling
        return Factors(one, None, rows.to(torch.float32), None, 1.0)


class LoKrCodec(Codec):
    """`lokr_w1` C (up, uq), `lokr_w2` D (vp, vq[, k, k]), `alpha`; ΔW = s·(C ⊗ D), d_out = up·vp, d_in = uq·vq.

    A factor of low rank is `…_a` (rows, r) times `…_b` (r, columns[·k·k]); then s = alpha / r, where both are full s = 1. With
    `lokr_t2` (r, r, k, k) D is a Tucker product of `lokr_w2_a` (r, vp) and `lokr_w2_b` (r, vq); it is read as a full D.
    A fused projection is split where its slices are whole blocks of vp rows, or lie inside one; other slices become one factor D
    each with C = 1, exact but larger: of rank uq·r, or a full matrix. With `dora_scale` W + ΔW is
    decomposed, as in `DoRACodec`.
    """

    method: ClassVar[str] = "lokr"
    algo: ClassVar[str] = "lokr"
    ends: ClassVar[tuple[str, ...]] = (*LEFT, *RIGHT, CORE, SCALE)
    groups: ClassVar[bool] = True

    def mine(self, shapes: Shapes) -> bool:
        return any(part.startswith("lokr_") for part in shapes)

    def rank(self, shapes: Shapes) -> int | None:
        return next((shapes[part][0] for part in (LEFT[2], RIGHT[2]) if shapes.get(part)), None)

    def read(self, module: Module) -> list[Piece]:
        whole, rows = _factors(module), spans(module.place)
        found = {name: part for name, wanted in rows.items() if (part := whole.rows(wanted)) is not None}
        if len(found) < len(rows):
            if module.first.kernel:
                why = f"is LoKr in blocks of {len(whole.right)} rows, which its slices are not made of"
                raise module.refuse(why, given=len(whole.right))
            found = {name: whole.expanded(wanted) for name, wanted in rows.items()}
            module.notes.append("LoKr whose blocks do not fit a fused projection's slices is loaded as one matrix per slice")
        sites, all_of = module.place.sites, len(rows) == 1 or SCALE in module.parts
        some = [s for s in sites if all_of or (found[s.name].left.any() and found[s.name].right.any())] or sites[:1]
        pieces = [_piece(site, found[site.name]) for site in some]
        if SCALE in module.parts:
            return decomposed(module, pieces, lambda p: change_of("lokr", p, _outright(p)))
        return pieces

    def write(self, group: Group) -> dict[str, Tensor]:
        return self._factors(group) | written(group, change)

    def _factors(self, group: Group) -> dict[str, Tensor]:
        given = {name: _of(adapter) for name, adapter in group.adapters.items()}
        found = _joined(group, given)
        full = found.left_down is None and found.right_down is None
        rank = 1 if full else len(found.right_down if found.left_down is None else found.left_down)  # type: ignore[arg-type]
        scaling = found.scaling
        if full or not scaling:  # s = 1 where both are full; an alpha of 0 is read in two ways
            found, scaling = replace(found, right=found.right * scaling if scaling != 1 else found.right), 1.0
        named = _named(LEFT, found.left, found.left_down) | _named(RIGHT, found.right, found.right_down)
        return {**named, "alpha": torch.tensor(float(scaling * rank))}

    @staticmethod
    def joins(group: Group) -> bool:
        """True if the adapters of a place are one Kronecker product together."""
        try:
            _joined(group, {name: _of(adapter) for name, adapter in group.adapters.items()})
        except SaveError:
            return False
        return True

    def config(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The `factor` and `rank` that tell the most splits, and others outright by site."""
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
        best = max(tried, key=lambda m: sum(_tells(m, p) for p in pieces))
        own = {f"name:{p.site.name}": _outright(p) for p in pieces if not _tells(best, p)}
        return {**best.config(), "by_site": own}

    def args(self, group: Group) -> dict[str, str]:
        splits = [a.split for a in group.adapters.values()]
        full = all(s.left_rank is None and s.right_rank is None for s in splits)
        both = any(s.left_rank is not None for s in splits)
        form = {"full_matrix": "True"} if full else {"decompose_both": "True"} if both else {}
        return form | decomposition(group)


def _factors(module: Module) -> Factors:
    """What the tensors of a module mean.

    Raises:
        LoadError: they are no two factors of the weight's sides, or of two ranks.
    """
    parts, site = module.parts, module.first
    left, left_down, first = _factor(module, LEFT)
    right, right_down, second = _tucker(module) if CORE in parts else _factor(module, RIGHT)
    if first and second and first != second and "alpha" in parts:
        why = f"has factors of rank {first} and {second}, of which each tool divides alpha by another"
        raise module.refuse(why, given=(first, second))
    rank = first or second
    scaling = alpha_of(module.file, module.name, parts.get("alpha"), rank) / rank if rank else 1.0
    if CORE in parts:
        right, scaling = right * scaling, 1.0
    width, uq = site.weight_shape[1], (left if left_down is None else left_down).shape[1]
    columns = (right if right_down is None else right_down).flatten(1).shape[1]
    one = right if right_down is None else right_down
    module.expect(straight(one, (width // max(uq, 1), *site.kernel)) and straight(left), "factors of two sides, or a kernel's")
    sides = len(left) * len(right) == module.rows and uq * columns == math.prod(site.weight_shape[1:])
    module.expect(sides and width % uq == 0, "factors whose sides multiply to the weight's")
    shape = (width // uq, *site.kernel)
    if right_down is None:
        return Factors(left, left_down, right.reshape(len(right), *shape), None, scaling)
    return Factors(left, left_down, right, right_down.reshape(len(right_down), *shape), scaling)


def _factor(module: Module, names: tuple[str, str, str]) -> tuple[Tensor, Tensor | None, int | None]:
    """(rows, columns, rank) of one factor: whole and without columns of its own, or of low rank."""
    parts, (name, up, down) = module.parts, names
    one = (name in parts) != (up in parts and down in parts)
    module.expect(one and all(parts[p].ndim > 1 for p in names if p in parts), f"{name}, or {up} and {down}")
    if name in parts:
        return parts[name], None, None
    rows, columns = parts[up].flatten(1), parts[down]
    module.expect(rows.shape[1] == len(columns) > 0, f"{up} and {down} of one rank")
    return rows, columns, len(columns)


def _tucker(module: Module) -> tuple[Tensor, None, int]:
    """D multiplied out, and the rank that alpha is divided by."""
    names = (CORE, *RIGHT[1:])
    module.expect(all(p in module.parts for p in names) and RIGHT[0] not in module.parts, f"all of {', '.join(names)}")
    core, rows, columns = (module.parts[p].double() for p in names)
    rank = len(columns)
    module.expect(core.ndim > 2 and core.shape[:2] == (len(rows), rank) and rank > 0, f"a core of rank {rank}")
    return torch.einsum("pq...,po,qi->oi...", core, rows, columns), None, rank


def _piece(site: WeightSite, found: Factors) -> Piece:
    """A site's options are what `config` reckons with: the sides of C, both ranks, and alpha where one of them is low."""
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
    return Piece(site, options, state)


def _tells(method: Any, piece: Piece) -> bool:
    """True if a config without options by site means this piece's split and scale."""
    site, wanted = piece.site, piece.options
    (up, _), (uq, _) = kron_factors(site.d_out, method.factor), kron_factors(site.weight_shape[1], method.factor)
    split = method.split(site)
    same = (
        (up, uq) == wanted["sides"]
        and method.norm_axis == wanted["norm_axis"]
        and (split.left_rank, split.right_rank) == (wanted["left"], wanted["right"])
    )
    full = wanted["left"] is None and wanted["right"] is None
    return bool(same and (full or (method.alpha or method.rank) == wanted["alpha"]))


def _outright(piece: Piece) -> dict[str, Any]:
    """Options that mean a piece's split whatever the plain ones are."""
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


def _of(adapter: Any) -> Factors:
    low = [getattr(adapter, f"{n}_down", None) if getattr(adapter, n) is None else None for n in ("left", "right")]
    rows = [
        getattr(adapter, n) if d is None else getattr(adapter, f"{n}_up") for n, d in zip(("left", "right"), low, strict=True)
    ]
    left_down, right_down = (None if d is None else d.detach() for d in low)
    return Factors(rows[0].detach(), left_down, rows[1].detach(), right_down, adapter.scaling)


def _joined(group: Group, given: Mapping[str, Factors]) -> Factors:
    """The factors of all rows: blocks of one D below each other, or rows of one block.

    Raises:
        SaveError: the slices of a fused projection are no Kronecker product together.
    """
    place, first = group.place, next(iter(given.values()))
    if len(place.sites) == 1 and not place.swapped:
        return first
    same = [
        n
        for n in ("left", "left_down", "right", "right_down", "scaling")
        if all(_equal(getattr(f, n), getattr(first, n)) for f in given.values())
    ]
    side = len(first.right)
    if {"left_down", "right", "right_down", "scaling"} <= set(same) and all(s.d_out % side == 0 for s in place.sites):
        rows = {
            s.name: given[s.name].left if s.name in given else first.left.new_zeros(s.d_out // side, first.left.shape[1])
            for s in place.sites
        }
        if not place.swapped or len(first.left) % 2 == 0:
            return replace(first, left=put(place, rows))
    if {"left", "left_down", "right_down", "scaling"} <= set(same) and len(first.left) == 1 and len(given) == len(place.sites):
        return replace(first, right=put(place, {name: f.right for name, f in given.items()}))
    raise group.refuse(
        f"is part of '{place.names[0]}', one weight in this layout, and LoKr of each slice is no Kronecker product of the whole",
        given=place.names[0],
        expected="factors",
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a is b or a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


def _named(names: tuple[str, str, str], rows: Tensor, columns: Tensor | None) -> dict[str, Tensor]:
    name, up, down = names
    return {name: rows} if columns is None else {up: rows, down: columns.flatten(1)}


def _method() -> Any:
    from veneer.injection import methods

    return methods.get("lokr")
