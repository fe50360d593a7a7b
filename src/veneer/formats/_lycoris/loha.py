"""LoHa in the LyCORIS format."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core.dora_magnitudes import SCALE, add_magnitudes, delta_weight, magnitude_tensors, piece_delta
from .._core.lora_reader import alpha_of
from .._names.kohya_fused import LoRAFactors, merge_factors, share_down
from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors, has_row_order, put, spans, take
from .lora import decomposition

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


class LoHaCodec(Codec):
    """`hada_w1_a` (d_out, r) B1, `hada_w1_b` (r, d_in·k·k) A1, `hada_w2_…` the same, `alpha`; ΔW = (alpha / r)·(B1 A1) ∘ (B2 A2).

    Tucker: `hada_t1` (r, r, k, k) the core, `hada_w1_a` (r, d_out), `hada_w1_b` (r, d_in).
    A fused projection is split by the rows of both B, and written block by block, as LoRA is. With `dora_scale`, W + ΔW is
    decomposed, as in `DoRACodec`.
    """

    method: ClassVar[str] = "loha"
    algo: ClassVar[str] = "loha"
    suffixes: ClassVar[tuple[str, ...]] = (*FACTORS, *CORES, SCALE)
    groups: ClassVar[bool] = True

    def matches(self, shapes: Shapes) -> bool:
        return any(part.startswith("hada_") for part in shapes)

    def rank(self, shapes: Shapes) -> int | None:
        return (shapes.get("hada_w1_b") or (None,))[0]

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        (up1, down1, up2, down2), cores = _factors(module)
        rank, site = len(down1), module.first
        scaling = alpha_of(module.file, module.name, module.parts.get("alpha"), rank) / rank
        inner = site.weight_shape[1 : 2 if cores else None]
        ups = {name: (take(up1, rows), take(up2, rows)) for name, rows in spans(module.place).items()}
        used = {
            name: _nonzero_components(*both) if len(ups) > 1 else torch.ones(rank, dtype=torch.bool) for name, both in ups.items()
        }
        if SCALE in module.parts or not any(keep.any() for keep in used.values()):
            used = {name: torch.ones_like(keep) for name, keep in used.items()}
        pieces = []
        for site in (s for s in module.place.sites if used[s.name].any()):
            keep = used[site.name]
            count = int(keep.sum())
            state = {f"up{i}": up[:, keep] for i, up in enumerate(ups[site.name], 1)}
            state |= {f"down{i}": down[keep].reshape(count, *inner) for i, down in enumerate((down1, down2), 1)}
            state |= {f"core{i}": core for i, core in enumerate(cores, 1)}
            tucker = {"tucker": bool(cores)} if math.prod(site.kernel) > 1 else {}
            pieces.append(SiteTensors(site, {"rank": count, "alpha": scaling * count, **tucker, "norm_axis": None}, state))
        return add_magnitudes(module, pieces, lambda p: piece_delta("loha", p, p.options)) if SCALE in module.parts else pieces

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        return self._factors(group) | magnitude_tensors(group, delta_weight)

    def _factors(self, group: AdapterGroup) -> dict[str, Tensor]:
        first = next(iter(group.adapters.values()))
        if first.core1 is not None:  # a convolution; convolutions are never fused
            ups = [put(group.place, {group.site.name: up.detach()}).mT for up in (first.up1, first.up2)]
            found = dict(zip(FACTORS, (ups[0], first.down1, ups[1], first.down2), strict=True))
            return _add_alpha({**found, "hada_t1": first.core1, "hada_t2": first.core2}, first.scaling)
        scales = {name: a.scaling for name, a in group.adapters.items()}
        one, two = ({name: _product_factors(a, i, scales[name]) for name, a in group.adapters.items()} for i in (1, 2))
        stacked = all(share_down(group.place, {name: p.down for name, p in pairs.items()}) for pairs in (one, two))
        first, second = (merge_factors(group.place, pairs, stacked) for pairs in (one, two))
        return _add_alpha(dict(zip(FACTORS, (first.up, first.down, second.up, second.down), strict=True)), first.scaling)

    def args(self, group: AdapterGroup) -> dict[str, str]:
        tucker = {"use_tucker": "True"} if any(a.core1 is not None for a in group.adapters.values()) else {}
        return tucker | decomposition(group)


def _factors(module: LycorisModule) -> tuple[Factors, list[Tensor]]:
    """B1, A1, B2, A2, flattened, and the cores of kernels larger than 1×1.

    Raises:
        LoadError: they differ in rank, or do not match the weight's dimensions.
    """
    parts, site = module.parts, module.first
    module.expect(all(f in parts and parts[f].ndim > 1 for f in FACTORS), f"all of {', '.join(FACTORS)}")
    module.expect(all(has_row_order(parts[f], site.weight_shape[1:]) for f in FACTORS), "factors of two sides")
    up1, down1, up2, down2 = (parts[f].flatten(1) for f in FACTORS)
    cores = [parts[core] for core in CORES if core in parts]
    rank, width, size = len(down1), site.weight_shape[1], math.prod(site.kernel)
    if cores:
        right = [c.numel() for c in cores] == [rank * rank * size] * 2 and all(c.shape[:2] == (rank, rank) for c in cores)
        right = right and all(c.shape[2:] in (site.kernel, (size,)) for c in cores)
        module.expect(right, f"two cores of ({rank}, {rank}, kernel)")
        up1, up2 = up1.mT, up2.mT
        if size == 1:  # a 1×1 core is a matrix
            down1, down2 = (c.double().view(rank, rank) @ d.double() for c, d in zip(cores, (down1, down2), strict=True))
            cores = []
    inner = width if cores else width * size
    right = all(up.shape == (module.rows, rank) for up in (up1, up2)) and down1.shape == down2.shape == (rank, inner)
    module.expect(rank > 0 and right, f"factors of one rank r, ({module.rows}, r) and (r, {inner})")
    return (up1, down1, up2, down2), [c.reshape(rank, rank, *site.kernel) for c in cores]


def _nonzero_components(up1: Tensor, up2: Tensor) -> Tensor:
    """Mask of the components with nonzero rows."""
    return up1.any(0) | up2.any(0)


def _product_factors(adapter: Any, i: int, scaling: float) -> LoRAFactors:
    """Factors of one of the two products; the first carries the scale, and a scale of 0 becomes B = 0."""
    down, up = (getattr(adapter, f"{half}{i}").detach() for half in ("down", "up"))
    up = up if scaling or i == 2 else torch.zeros_like(up)
    return LoRAFactors(down.flatten(1), up, scaling or 1.0 if i == 1 else 1.0)


def _add_alpha(found: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Adds alpha; a scale of 0, which tools interpret in two ways, becomes B1 = 0."""
    if not scaling:
        found, scaling = {**found, FACTORS[0]: torch.zeros_like(found[FACTORS[0]])}, 1.0
    return {**found, "alpha": torch.tensor(scaling * len(found[FACTORS[1]]))}
