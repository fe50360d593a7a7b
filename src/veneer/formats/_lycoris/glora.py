"""GLoRA in the LyCORIS format."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core.lora_reader import alpha_of
from .._names.kohya_fused import LoRAFactors, merge_factors, share_down
from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors, has_row_order, spans, take

TERMS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
OPTIONS: dict[str, Any] = {"A": "low_rank", "B": "low_rank", "D": "none", "E": "none", "product": "matrices"}


class GLoRACodec(Codec):
    """`a1` (d_in, r), `a2` (r, d_in), `b1` (d_out, r), `b2` (r, d_in[, k, k]), `alpha`; ΔW = (alpha / r)·(W a1 a2 + b1 b2).

    W A is a matrix product over the input channels of each kernel, glora's `product="matrices"`; the elementwise W ∘ A cannot be
    stored. The scale is folded into `a1` and `b1`. Files of an older LyCORIS swap the names of the two factors of each product;
    shapes tell them apart.
    A fused projection is split by the rows of `b1`; to be written as one, all its slices must share A.
    """

    method: ClassVar[str] = "glora"
    algo: ClassVar[str] = "glora"
    suffixes: ClassVar[tuple[str, ...]] = TERMS

    def matches(self, shapes: Shapes) -> bool:
        return TERMS[0] in shapes

    def rank(self, shapes: Shapes) -> int | None:
        return min(shapes[TERMS[0]][:2]) if len(shapes.get(TERMS[0], ())) > 1 else None

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        module.expect(all(t in module.parts and module.parts[t].ndim > 1 for t in TERMS), f"all of {', '.join(TERMS)}")
        module.expect(all(has_row_order(module.parts[t], module.first.weight_shape[1:]) for t in TERMS), "terms of two sides")
        a_up, a_down, b_up, b_down = (module.parts[t].flatten(1) for t in TERMS)
        width, inner = module.first.weight_shape[1], math.prod(module.first.weight_shape[1:])

        def right(*terms: Tensor) -> bool:
            rank = len(terms[1])
            return [t.shape for t in terms] == [(width, rank), (rank, width), (module.rows, rank), (rank, inner)]

        if not right(a_up, a_down, b_up, b_down):
            a_up, a_down, b_up, b_down = a_down, a_up, b_down, b_up
        expected = f"({width}, r), (r, {width}), ({module.rows}, r) and (r, {inner})"
        module.expect(right(a_up, a_down, b_up, b_down) and len(a_down) > 0, expected)
        rank = len(a_down)
        scaling = alpha_of(module.file, module.name, module.parts.get("alpha"), rank) / rank
        a_up, b_up = a_up.double() * scaling, b_up.double() * scaling  # avoids a second rounding in half precision
        state = {"scale.up": a_up, "scale.down": a_down, "shift.down": b_down}
        rows = spans(module.place)
        return [
            SiteTensors(site, {**OPTIONS, "rank": rank}, {**state, "shift.up": take(b_up, rows[site.name])})
            for site in module.place.sites
        ]

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        site, adapters = group.site, list(group.adapters.values())
        for adapter in adapters:
            forms = (adapter.scale.form, adapter.shift.form)
            if set(forms) - {"low_rank", "none"} or not (adapter.matrices or adapter.scale.form == "none"):
                raise group.error(
                    f"scales W by A ({forms[0]}, elementwise) and adds B ({forms[1]}); this format has W A + B of low rank: "
                    "train with product='matrices', and A and B low_rank or none",
                    given=forms,
                    expected=("low_rank", "none"),
                )
        width, inner = site.weight_shape[1], math.prod(site.weight_shape[1:])
        a_up, a_down = _shared_scale(group, width)
        pairs = {}
        for name, adapter in group.adapters.items():
            up, down = _term(adapter.shift, _d_out(group, name), inner)
            pairs[name] = LoRAFactors(down, up, 1.0)
        low = merge_factors(group.place, pairs, share_down(group.place, {n: p.down for n, p in pairs.items()}))
        rank = max(a_up.shape[1], low.up.shape[1])
        ups = [_pad_rank(up, rank, 1) for up in (a_up, low.up)]
        terms = [up.reshape(*up.shape, *group.ones) for up in ups]
        terms.insert(1, _pad_rank(a_down, rank, 0).reshape(rank, width, *group.ones))
        terms.append(_pad_rank(low.down, rank, 0).reshape(rank, *site.weight_shape[1:]))
        return {**dict(zip(TERMS, terms, strict=True)), "alpha": torch.tensor(float(rank))}


def _shared_scale(group: AdapterGroup, width: int) -> tuple[Tensor, Tensor]:
    """The A that all slices share.

    Raises:
        SaveError: they differ, or a slice is not adapted.
    """
    found = [_term(a.scale, width, width) for a in group.adapters.values()]
    same = all(torch.equal(t, u) for terms in found for t, u in zip(terms, found[0], strict=True))
    whole = len(found) == len(group.place.sites)
    if not (same and whole) and any(a.scale.form != "none" for a in group.adapters.values()):
        raise group.error(
            f"is a slice of '{group.place.names[0]}', one weight in this format, but not all slices share the same A",
            given=group.place.names[0],
            expected="A",
        )
    return found[0]


def _d_out(group: AdapterGroup, name: str) -> int:
    return next(site.d_out for site in group.place.sites if site.name == name)


def _term(term: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(up, down) of a term; zeros of rank 1 if it has none."""
    if term.form == "none":
        return torch.zeros(rows, 1), torch.zeros(1, columns)
    return term.up.detach(), term.down.detach()


def _pad_rank(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """Zero-pads the tensor to the given rank."""
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
