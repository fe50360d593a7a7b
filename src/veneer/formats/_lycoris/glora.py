"""GLoRA in LyCORIS' layout."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core.lora_reader import alpha_of
from .._names.kohya_fused import Pair, alike, together
from .codec import Codec, Group, Module, Piece, Shapes, spans, straight, take

TERMS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
OPTIONS: dict[str, Any] = {"A": "low_rank", "B": "low_rank", "D": "none", "E": "none", "product": "matrices"}


class GLoRACodec(Codec):
    """`a1` (d_in, r), `a2` (r, d_in), `b1` (d_out, r), `b2` (r, d_in[, k, k]), `alpha`; ΔW = (alpha / r)·(W a1 a2 + b1 b2).

    W A is a product of matrices, over the inputs of each kernel; that is glora's `product="matrices"`, and its elementwise W ∘ A
    has no place here. The scale becomes part of `a1` and `b1`. In files of an older LyCORIS the halves of each product have
    each other's names; they are known by their shapes.
    A fused projection is split by the rows of `b1`; joined, all its slices must have one A.
    """

    method: ClassVar[str] = "glora"
    algo: ClassVar[str] = "glora"
    ends: ClassVar[tuple[str, ...]] = TERMS

    def mine(self, shapes: Shapes) -> bool:
        return TERMS[0] in shapes

    def rank(self, shapes: Shapes) -> int | None:
        return min(shapes[TERMS[0]][:2]) if len(shapes.get(TERMS[0], ())) > 1 else None

    def read(self, module: Module) -> list[Piece]:
        module.expect(all(t in module.parts and module.parts[t].ndim > 1 for t in TERMS), f"all of {', '.join(TERMS)}")
        module.expect(all(straight(module.parts[t], module.first.weight_shape[1:]) for t in TERMS), "terms of two sides")
        a_up, a_down, b_up, b_down = (module.parts[t].flatten(1) for t in TERMS)
        width, inner = module.first.weight_shape[1], math.prod(module.first.weight_shape[1:])

        def right(*terms: Tensor) -> bool:
            rank = len(terms[1])
            return [t.shape for t in terms] == [(width, rank), (rank, width), (module.rows, rank), (rank, inner)]

        if not right(a_up, a_down, b_up, b_down):
            a_up, a_down, b_up, b_down = a_down, a_up, b_down, b_up
        wanted = f"({width}, r), (r, {width}), ({module.rows}, r) and (r, {inner})"
        module.expect(right(a_up, a_down, b_up, b_down) and len(a_down) > 0, wanted)
        rank = len(a_down)
        scaling = alpha_of(module.file, module.name, module.parts.get("alpha"), rank) / rank
        a_up, b_up = a_up.double() * scaling, b_up.double() * scaling  # half precision would round once more
        state = {"scale.up": a_up, "scale.down": a_down, "shift.down": b_down}
        rows = spans(module.place)
        return [
            Piece(site, {**OPTIONS, "rank": rank}, {**state, "shift.up": take(b_up, rows[site.name])})
            for site in module.place.sites
        ]

    def write(self, group: Group) -> dict[str, Tensor]:
        site, adapters = group.site, list(group.adapters.values())
        for adapter in adapters:
            forms = (adapter.scale.form, adapter.shift.form)
            if set(forms) - {"low_rank", "none"} or not (adapter.matrices or adapter.scale.form == "none"):
                raise group.refuse(
                    f"scales W by A ({forms[0]}, elementwise) and adds B ({forms[1]}); the layout has W A + B of low rank: train "
                    "with product='matrices', and A and B low_rank or none",
                    given=forms,
                    expected=("low_rank", "none"),
                )
        width, inner = site.weight_shape[1], math.prod(site.weight_shape[1:])
        a_up, a_down = _shared(group, width)
        pairs = {}
        for name, adapter in group.adapters.items():
            up, down = _term(adapter.shift, _d_out(group, name), inner)
            pairs[name] = Pair(down, up, 1.0)
        low = together(group.place, pairs, alike(group.place, {n: p.down for n, p in pairs.items()}))
        rank = max(a_up.shape[1], low.up.shape[1])
        ups = [_wide(up, rank, 1) for up in (a_up, low.up)]
        terms = [up.reshape(*up.shape, *group.ones) for up in ups]
        terms.insert(1, _wide(a_down, rank, 0).reshape(rank, width, *group.ones))
        terms.append(_wide(low.down, rank, 0).reshape(rank, *site.weight_shape[1:]))
        return {**dict(zip(TERMS, terms, strict=True)), "alpha": torch.tensor(float(rank))}


def _shared(group: Group, width: int) -> tuple[Tensor, Tensor]:
    """The one A of all slices.

    Raises:
        SaveError: they have others, or one is not adapted.
    """
    found = [_term(a.scale, width, width) for a in group.adapters.values()]
    same = all(torch.equal(t, u) for terms in found for t, u in zip(terms, found[0], strict=True))
    whole = len(found) == len(group.place.sites)
    if not (same and whole) and any(a.scale.form != "none" for a in group.adapters.values()):
        raise group.refuse(
            f"is part of '{group.place.names[0]}', one weight in this layout, whose slices have another A, or none",
            given=group.place.names[0],
            expected="A",
        )
    return found[0]


def _d_out(group: Group, name: str) -> int:
    return next(site.d_out for site in group.place.sites if site.name == name)


def _term(term: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(up, down) of a term; zeros of rank 1 where there is none."""
    if term.form == "none":
        return torch.zeros(rows, 1), torch.zeros(1, columns)
    return term.up.detach(), term.down.detach()


def _wide(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """As many components, the added ones zero."""
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
