"""LoRA, and DoRA with its magnitudes, in LyCORIS' layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..injection.sites import WeightSite
from ._kohya_fused import Pair, alike, joined, split, together
from ._lora import Found, config_of, shaped
from ._lycoris_codec import Codec, Group, Module, Piece, Shapes, put, spans, take
from ._magnitudes import base_weight, magnitude, magnitude_delta
from ._pairs import DOWN, MID, UP, pair, whole


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
    """LoRA's tensors and `dora_scale` m (d_out, 1[, 1, 1]): W' = m·(W + s·B A) / ‖W + s·B A‖, the norm of an output's row.

    A `dora_scale` (1, d_in[, 1, 1]), the norm of an input's column (`wd_on_output=False`), is another function, and refused.
    ComfyUI divides by the norm of W itself, not of the sum: what it draws from the same file differs a little.
    """

    method: ClassVar[str] = "dora"
    ends: ClassVar[tuple[str, ...]] = (*LoRACodec.ends, "dora_scale")

    def mine(self, shapes: Shapes) -> bool:
        return "dora_scale" in shapes

    def read(self, module: Module) -> list[Piece]:
        m = module.parts["dora_scale"]
        if DOWN not in module.parts or UP not in module.parts:
            others = ", ".join(part for part in module.parts if part not in ("dora_scale", "alpha"))
            raise module.refuse(f"has dora_scale beside {others}: no method here has magnitudes around such a change")
        if m.ndim > 1 and m.shape[0] != module.rows and m.numel() == m.shape[1] == module.first.weight_shape[1]:
            raise module.refuse("has magnitudes of inputs (wd_on_output=False), and dora has those of outputs: another function")
        module.expect(m.numel() == m.shape[0] == module.rows if m.ndim else False, f"dora_scale ({module.rows}, 1)")
        module.expect(whole(module.parts), "a lora_down and a lora_up of one rank")
        low = pair(module.file, module.name, module.parts)
        module.expect(low.up.shape[0] == module.rows and _fits(low.down, module.first), "factors of the weight's sides")
        rows = spans(module.place)
        found = [
            self._piece(module, site, low, take(low.up, rows[site.name]), take(m, rows[site.name])) for site in module.place.sites
        ]
        return [piece for piece, changes in found if changes] or [piece for piece, _ in found]

    @staticmethod
    def _piece(module: Module, site: WeightSite, low: Pair, up: Tensor, m: Tensor) -> tuple[Piece, bool]:
        """The rows of one site, of the components only that touch them, and whether they change anything."""
        keep = up.flatten(1).any(0)
        if len(module.place.sites) > 1 and keep.any():
            low = Pair(low.down[keep], up[:, keep], low.scaling)
        else:
            low = Pair(low.down, up, low.scaling)
        weight = base_weight(module.towers[site.component], site)
        delta = magnitude_delta(m, weight, low.up, low.down, low.scaling)
        near = torch.finfo(torch.float32).eps * 4 * weight.flatten(1).norm(dim=1).to(delta)
        piece = _piece(site, low)
        return Piece(site, piece.options, {**piece.state, "magnitude_delta": delta}), bool(
            keep.any() or (delta.abs() > near).any()
        )

    def write(self, group: Group) -> dict[str, Tensor]:
        lows = {n: Pair(a.down.detach(), a.up.detach(), a.scaling) for n, a in group.adapters.items()}
        found = tensors(together(group.place, lows, alike(group.place, {n: p.down for n, p in lows.items()})), group)
        m = {}
        for site in group.place.sites:
            weight, adapter = base_weight(group.towers[site.component], site), group.adapters.get(site.name)
            low = Pair(weight.new_zeros(1, weight[0].numel()), weight.new_zeros(len(weight), 1), 1.0)
            low, delta = (low, weight.new_zeros(len(weight))) if adapter is None else (lows[site.name], adapter.magnitude_delta)
            m[site.name] = magnitude(delta, weight, low.up, low.down, low.scaling)
        return {**found, "dora_scale": put(group.place, m).view(-1, 1, *group.ones)}

    def config(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return Codec.config(self, pieces)

    def args(self, group: Group) -> dict[str, str]:
        return {"dora_wd": "True"}


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
