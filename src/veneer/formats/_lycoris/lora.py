"""LoRA, and DoRA with its magnitudes, in LyCORIS' layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.sites import WeightSite

from .._core.dora_magnitudes import SCALE, axis_of, base_weight, decomposed, written
from .._core.lora_config import Found, config_of, shaped
from .._core.lora_reader import DOWN, MID, UP, pair, whole
from .._names.kohya_fused import Pair, alike, joined, split, together
from .codec import Codec, Group, Module, Piece, Shapes, spans, take


class LoRACodec(Codec):
    """`lora_down.weight` (r, d_in[, k, k]), `lora_up.weight` (d_out, r[, 1, 1]), [`lora_mid.weight` (r, r, k, k)], `alpha`."""

    method: ClassVar[str] = "lora"
    algo: ClassVar[str] = "lora"
    ends: ClassVar[tuple[str, ...]] = (DOWN, UP, MID)

    def mine(self, shapes: Shapes) -> bool:
        return DOWN in shapes or UP in shapes

    def rank(self, shapes: Shapes) -> int | None:
        return (shapes.get(DOWN) or (None,))[0]

    def read(self, module: Module) -> list[Piece]:
        module.expect(whole(module.parts), "a lora_down and a lora_up of one rank")
        found = split(module.file, module.name, module.place, pair(module.file, module.name, module.parts))
        return [_piece(site, low) for site, low in found]

    def write(self, group: Group) -> dict[str, Tensor]:
        return tensors(joined(group.place, group.adapters), group)

    def config(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return config_of({p.site.name: Found(p.site, p.options["rank"], p.options["alpha"]) for p in pieces})


class DoRACodec(LoRACodec):
    """LoRA's tensors and `dora_scale` m: W' = m·(W + s·B A) / ‖W + s·B A‖.

    m is (d_out, 1[, 1, 1]) with the norm of an output's row, or (1, d_in[, 1, 1]) with the norm of an input channel's column
    (LyCORIS' `wd_on_output=False`, OneTrainer's default); in a fused projection that column has the rows of all slices.
    ComfyUI computes the same weight on the input axis. On the output axis it divides by ‖W‖ and not by ‖W + s·B A‖, so each
    row is too long by the factor ‖W + s·B A‖ / ‖W‖: 0.5 % where ‖s·B A‖ is 0.1·‖W‖, 28 % where it is 0.8·‖W‖ (s·B A ⊥ W).
    """

    method: ClassVar[str] = "dora"
    ends: ClassVar[tuple[str, ...]] = (*LoRACodec.ends, SCALE)

    def mine(self, shapes: Shapes) -> bool:
        return SCALE in shapes and not any(part.startswith(("hada_", "lokr_")) for part in shapes)

    def read(self, module: Module) -> list[Piece]:
        if DOWN not in module.parts or UP not in module.parts:
            others = ", ".join(part for part in module.parts if part not in (SCALE, "alpha"))
            why = f"has dora_scale beside {others}: no method here has magnitudes around such a change"
            raise module.refuse(why, given=tuple(module.parts))
        axis = axis_of(module)
        module.expect(whole(module.parts), "a lora_down and a lora_up of one rank")
        low = pair(module.file, module.name, module.parts)
        module.expect(low.up.shape[0] == module.rows and _fits(low.down, module.first), "factors of the weight's sides")
        rows, several = spans(module.place), len(module.place.sites) > 1
        lows = {s.name: _touching(low, take(low.up, rows[s.name]), several) for s in module.place.sites}
        pieces = [_piece(site, lows[site.name]) for site in module.place.sites]
        found = decomposed(module, pieces, lambda piece: _change(lows[piece.site.name], piece.site))
        if axis == "input" or not several:
            return found
        return [p for p in found if self._changes(module, p)] or found

    @staticmethod
    def _changes(module: Module, piece: Piece) -> bool:
        """True if a piece is not the base's own weight, but for rounding."""
        weight, delta = base_weight(module.towers[piece.site.component], piece.site), piece.state["magnitude_delta"]
        near = torch.finfo(torch.float32).eps * 4 * weight.flatten(1).norm(dim=1).to(delta)
        return bool(piece.state["up"].any() or (delta.abs() > near).any())

    def write(self, group: Group) -> dict[str, Tensor]:
        lows = {n: Pair(a.down.detach(), a.up.detach(), a.scaling) for n, a in group.adapters.items()}
        found = tensors(together(group.place, lows, alike(group.place, {n: p.down for n, p in lows.items()})), group)
        return {**found, **written(group, lambda a: _change(Pair(a.down.detach(), a.up.detach(), a.scaling), a.site))}

    def config(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return Codec.config(self, pieces)

    def args(self, group: Group) -> dict[str, str]:
        return decomposition(group)


def decomposition(group: Group) -> dict[str, str]:
    """LyCORIS' options for the magnitudes of a group."""
    axis = next(iter(group.adapters.values())).norm_axis
    return {} if axis is None else {"dora_wd": "True"} | ({"wd_on_output": "False"} if axis == "input" else {})


def _touching(low: Pair, up: Tensor, several: bool) -> Pair:
    """The rows of one site, of the components only that touch them."""
    keep = up.flatten(1).any(0)
    if several and keep.any():
        return Pair(low.down[keep], up[:, keep], low.scaling)
    return Pair(low.down, up, low.scaling)


def _change(low: Pair, site: WeightSite) -> Tensor:
    """s·B A in the weight's shape, in double precision."""
    return (low.scaling * (low.up.double().flatten(1) @ low.down.double().flatten(1))).reshape(site.weight_shape)


def tensors(low: Pair, group: Group) -> dict[str, Tensor]:
    """A pair's tensors. A scale of 0 is written as B = 0, because an alpha of 0 is read in two ways."""
    up, scaling = (low.up, low.scaling) if low.scaling else (torch.zeros_like(low.up), 1.0)
    return {DOWN: low.down, UP: up.view(*up.shape[:2], *group.ones), "alpha": torch.tensor(scaling * low.down.shape[0])}


def _piece(site: WeightSite, low: Pair) -> Piece:
    rank = low.down.shape[0]
    state = {
        "down": shaped(low.down, (rank, *site.weight_shape[1:])),
        "up": shaped(low.up, (site.d_out, rank, *(1,) * len(site.kernel))),
    }
    return Piece(site, {"rank": rank, "alpha": low.scaling * rank}, state)


def _fits(down: Tensor, site: WeightSite) -> bool:
    return shaped(down, (len(down), *site.weight_shape[1:])).shape[1:] == site.weight_shape[1:]
