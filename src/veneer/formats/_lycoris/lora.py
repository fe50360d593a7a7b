"""LoRA, and DoRA with its magnitudes, in the LyCORIS format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.sites import WeightSite

from .._core.dora_magnitudes import SCALE, add_magnitudes, axis_of, base_weight, magnitude_tensors
from .._core.lora_config import LoRALayer, config_of, match_shape
from .._core.lora_reader import DOWN, MID, UP, is_complete, read_factors
from .._names.kohya_fused import LoRAFactors, merge_adapters, merge_factors, share_down, split_factors
from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors, spans, take


class LoRACodec(Codec):
    """`lora_down.weight` (r, d_in[, k, k]), `lora_up.weight` (d_out, r[, 1, 1]), [`lora_mid.weight` (r, r, k, k)], `alpha`."""

    method: ClassVar[str] = "lora"
    algo: ClassVar[str] = "lora"
    suffixes: ClassVar[tuple[str, ...]] = (DOWN, UP, MID)

    def matches(self, shapes: Shapes) -> bool:
        return DOWN in shapes or UP in shapes

    def rank(self, shapes: Shapes) -> int | None:
        return (shapes.get(DOWN) or (None,))[0]

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        module.expect(is_complete(module.parts), "lora_down and lora_up of the same rank")
        found = split_factors(module.file, module.name, module.place, read_factors(module.file, module.name, module.parts))
        return [_piece(site, low) for site, low in found]

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        return tensors(merge_adapters(group.place, group.adapters), group)

    def config(self, pieces: Sequence[SiteTensors]) -> dict[str, Any]:
        return config_of({p.site.name: LoRALayer(p.site, p.options["rank"], p.options["alpha"]) for p in pieces})


class DoRACodec(LoRACodec):
    """LoRA's tensors and `dora_scale` m: W' = m·(W + s·B A) / ‖W + s·B A‖.

    m is (d_out, 1[, 1, 1]), the norm of each output row, or (1, d_in[, 1, 1]), the norm of each input channel's column
    (LyCORIS' `wd_on_output=False`, OneTrainer's default); in a fused projection that column spans the rows of all slices.
    ComfyUI computes the same weight on the input axis. On the output axis it divides by ‖W‖ instead of ‖W + s·B A‖, so each
    row is too long by the factor ‖W + s·B A‖ / ‖W‖: 0.5 % where ‖s·B A‖ is 0.1·‖W‖, 28 % where it is 0.8·‖W‖ (s·B A ⊥ W).
    """

    method: ClassVar[str] = "dora"
    suffixes: ClassVar[tuple[str, ...]] = (*LoRACodec.suffixes, SCALE)

    def matches(self, shapes: Shapes) -> bool:
        return SCALE in shapes and not any(part.startswith(("hada_", "lokr_")) for part in shapes)

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        if DOWN not in module.parts or UP not in module.parts:
            others = ", ".join(part for part in module.parts if part not in (SCALE, "alpha"))
            why = f"has dora_scale with {others}: no method in veneer applies magnitudes to such an update"
            raise module.error(why, given=tuple(module.parts))
        axis = axis_of(module)
        module.expect(is_complete(module.parts), "lora_down and lora_up of the same rank")
        low = read_factors(module.file, module.name, module.parts)
        module.expect(
            low.up.shape[0] == module.rows and _has_input_shape(low.down, module.first), "factors of the weight's dimensions"
        )
        rows, several = spans(module.place), len(module.place.sites) > 1
        lows = {s.name: _restrict(low, take(low.up, rows[s.name]), several) for s in module.place.sites}
        pieces = [_piece(site, lows[site.name]) for site in module.place.sites]
        found = add_magnitudes(module, pieces, lambda piece: _delta(lows[piece.site.name], piece.site))
        if axis == "input" or not several:
            return found
        return [p for p in found if self._changes(module, p)] or found

    @staticmethod
    def _changes(module: LycorisModule, piece: SiteTensors) -> bool:
        """True if a piece differs from the base weight by more than rounding."""
        weight, delta = base_weight(module.towers[piece.site.component], piece.site), piece.state["magnitude_delta"]
        near = torch.finfo(torch.float32).eps * 4 * weight.flatten(1).norm(dim=1).to(delta)
        return bool(piece.state["up"].any() or (delta.abs() > near).any())

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        lows = {n: LoRAFactors(a.down.detach(), a.up.detach(), a.scaling) for n, a in group.adapters.items()}
        found = tensors(merge_factors(group.place, lows, share_down(group.place, {n: p.down for n, p in lows.items()})), group)
        return {
            **found,
            **magnitude_tensors(group, lambda a: _delta(LoRAFactors(a.down.detach(), a.up.detach(), a.scaling), a.site)),
        }

    def config(self, pieces: Sequence[SiteTensors]) -> dict[str, Any]:
        return Codec.config(self, pieces)

    def args(self, group: AdapterGroup) -> dict[str, str]:
        return decomposition(group)


def decomposition(group: AdapterGroup) -> dict[str, str]:
    """LyCORIS' options for the magnitudes of a group."""
    axis = next(iter(group.adapters.values())).norm_axis
    return {} if axis is None else {"dora_wd": "True"} | ({"wd_on_output": "False"} if axis == "input" else {})


def _restrict(low: LoRAFactors, up: Tensor, several: bool) -> LoRAFactors:
    """The rows of one site, restricted to components with nonzero rows."""
    keep = up.flatten(1).any(0)
    if several and keep.any():
        return LoRAFactors(low.down[keep], up[:, keep], low.scaling)
    return LoRAFactors(low.down, up, low.scaling)


def _delta(low: LoRAFactors, site: WeightSite) -> Tensor:
    """s·B A in the weight's shape, in double precision."""
    return (low.scaling * (low.up.double().flatten(1) @ low.down.double().flatten(1))).reshape(site.weight_shape)


def tensors(low: LoRAFactors, group: AdapterGroup) -> dict[str, Tensor]:
    """The tensors of a pair of factors. A scale of 0 is written as B = 0, because tools interpret an alpha of 0 in two ways."""
    up, scaling = (low.up, low.scaling) if low.scaling else (torch.zeros_like(low.up), 1.0)
    return {DOWN: low.down, UP: up.view(*up.shape[:2], *group.ones), "alpha": torch.tensor(scaling * low.down.shape[0])}


def _piece(site: WeightSite, low: LoRAFactors) -> SiteTensors:
    rank = low.down.shape[0]
    state = {
        "down": match_shape(low.down, (rank, *site.weight_shape[1:])),
        "up": match_shape(low.up, (site.d_out, rank, *(1,) * len(site.kernel))),
    }
    return SiteTensors(site, {"rank": rank, "alpha": low.scaling * rank}, state)


def _has_input_shape(down: Tensor, site: WeightSite) -> bool:
    return match_shape(down, (len(down), *site.weight_shape[1:])).shape[1:] == site.weight_shape[1:]
