"""OFT and BOFT in the format of kohya's tools and LyCORIS, which rotate the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.functional.cayley import clip_norm, skew
from veneer.injection.sites import WeightSite

from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors, is_aligned, put, spans, take

BLOCKS, RESCALE = "oft_blocks", "rescale"
SLICES = tuple(f"{BLOCKS}.{i}" for i in range(4))  # sd-scripts' own OFT of FLUX stores one tensor per slice
SLACK = 1.001  # the written constraint exceeds ‖Q‖ by this factor, so that no reader shortens Q


class OFTCodec(Codec):
    """`oft_blocks` (n, b, b), [`rescale` (d_out, 1[, 1, 1])], `alpha`; W' = D Rᵀ W, R_i = (I + Q_i)(I − Q_i)⁻¹, Q = B − Bᵀ.

    `alpha` is a constraint: ‖Q‖ of all blocks together is at most alpha·d_out; 0 or missing means no constraint. A longer Q is
    shortened on reading, and veneer's Q is then unconstrained. The written alpha shortens nothing, whether a tool multiplies it
    by d_out or, as ComfyUI, does not.
    A fused projection is split and merged where its slices are whole blocks. `oft_unet_` with one tensor per slice,
    `oft_blocks.0`, `oft_blocks.1`, …, as sd-scripts' own OFT writes, is read.
    LyCORIS' own loader only builds blocks whose size is at most their number (b² ≤ d_out); ComfyUI, A1111 and sd-scripts read
    other sizes as well. Train with a smaller `block_size` for LyCORIS.
    """

    method: ClassVar[str] = "oft"
    algo: ClassVar[str] = "diag-oft"
    suffixes: ClassVar[tuple[str, ...]] = (BLOCKS, *SLICES, RESCALE)

    def matches(self, shapes: Shapes) -> bool:
        return len(shapes.get(BLOCKS, ())) == 3 or SLICES[0] in shapes

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        if SLICES[0] in module.parts:
            return self._slices(module)
        q = -_constrained(module, module.parts[BLOCKS], module.rows)
        count, side, _ = q.shape
        module.expect(count * side == module.rows, f"blocks of {module.rows} rows")
        return _pieces(module, q, side, side, {"side": "output", "block_size": side})

    def args(self, group: AdapterGroup) -> dict[str, str]:
        return _args(group)

    def _slices(self, module: LycorisModule) -> list[SiteTensors]:
        """Blocks of each slice separately, each with its own constraint."""
        tensors = [module.parts[part] for part in SLICES if part in module.parts]
        right = len(tensors) == len(module.place.sites) and all(
            t.ndim == 3 and len(t) * t.shape[1] == s.d_out for t, s in zip(tensors, module.place.sites, strict=False)
        )
        module.expect(right and RESCALE not in module.parts, f"{BLOCKS}.i (n, b, b) for each of {len(module.place.sites)} slices")
        pieces = []
        for tensor, site in zip(tensors, module.place.sites, strict=True):
            q, side = -_constrained(module, tensor, site.d_out), tensor.shape[1]
            if module.place.swapped and len(q) % 2:
                raise module.error(f"rotates blocks of {side} outputs across the two halves of '{site.name}'", given=side)
            q = torch.cat(q.chunk(2)[::-1]) if module.place.swapped else q
            pieces += [_piece(site, q, None, {"side": "output", "block_size": side})] if side > 1 else []
        return [p for p in pieces if p.state["skew"].any()] or pieces[:1]

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        sizes = {_check_rotates_outputs(group, a, "OFT").size for a in group.adapters.values()}
        (side,) = sizes if len(sizes) == 1 else (0,)
        return _rotation_tensors(group, side, side, lambda a: _q(a).expand(a.site.d_out // a.size, -1, -1))


class BOFTCodec(Codec):
    """`oft_blocks` (m, n, b, b), [`rescale` (d_out, 1[, 1, 1])], `alpha`; W' = D B_m ⋯ B_1 W, blocks (I + Q)(I − Q)⁻¹.

    Q = B − Bᵀ. In B_i the two halves of a block are 2^(i−1) half-blocks apart. `alpha` as for OFT. The file interleaves the
    entries of the two halves of a block; veneer stores one half after the other.
    LyCORIS' own loader only builds m = log2(d_out / b) + 1 components, for d_out / b a power of 2: missing components are
    written as zeros, which are identity rotations, and dropped again on reading. ComfyUI and A1111 read other d_out / b as well.
    """

    method: ClassVar[str] = "boft"
    algo: ClassVar[str] = "boft"
    suffixes: ClassVar[tuple[str, ...]] = (BLOCKS, RESCALE)

    def matches(self, shapes: Shapes) -> bool:
        return len(shapes.get(BLOCKS, ())) == 4

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        q = _constrained(module, module.parts[BLOCKS], module.rows)
        m, count, side, _ = q.shape
        right = m > 0 and count * side == module.rows and side % 2 == 0 and module.rows % (2 ** (m - 1) * side) == 0
        module.expect(right, f"a butterfly of {module.rows} rows")
        m = 1 + max(q.flatten(1).any(1).nonzero().flatten().tolist(), default=0)  # the last nonzero component
        q, reach = q[:m], 2 ** (m - 1) * side
        order = torch.arange(side).view(-1, 2).mT.flatten()
        return _pieces(module, q[..., order, :][..., order], side, reach, {"side": "output", "m": m, "b": side})

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        shapes = {(len(_check_rotates_outputs(group, a, "BOFT").skew), a.size) for a in group.adapters.values()}
        (m, side), *others = shapes
        order = torch.arange(side).view(2, -1).mT.flatten()
        found = _rotation_tensors(
            group, 0 if others else side, 2 ** (m - 1) * side, lambda a: -_q(a)[..., order, :][..., order], m
        )
        blocks = found[BLOCKS]
        count = blocks.shape[1]
        full = count.bit_length() if count.bit_count() == 1 else m  # log2(count) + 1
        return {**found, BLOCKS: torch.cat([blocks, blocks.new_zeros(max(full - m, 0), *blocks.shape[1:])])}

    def args(self, group: AdapterGroup) -> dict[str, str]:
        return _args(group)


def _args(group: AdapterGroup) -> dict[str, str]:
    return {"rescaled": "True"} if any(a.magnitude is not None for a in group.adapters.values()) else {}


def _constrained(module: LycorisModule, blocks: Tensor, width: int) -> Tensor:
    """Q = B − Bᵀ, shortened to the constraint, in double precision."""
    module.expect(blocks.ndim > 2 and blocks.shape[-1] == blocks.shape[-2] > 0, "square blocks")
    q = blocks.double() - blocks.double().mT
    alpha = module.parts.get("alpha", torch.zeros(()))
    if alpha.numel() != 1 or float(alpha) < 0:
        values = alpha.flatten().tolist()[:4]
        raise module.error(f"has the constraint (alpha) {values}; expected a scalar of at least 0", given=values)
    if float(alpha) == 0 and module.name.startswith("oft_"):
        raise module.error(
            "has the constraint (alpha) 0, which sd-scripts interprets as no update and other tools as no constraint",
            given=0,
        )
    radius, norm = float(alpha) * width, float(q.norm())
    if 0 < radius < norm:
        module.notes.append("OFT was shortened to its constraint")
        q = q * (radius / norm)
    return q


def _pieces(module: LycorisModule, q: Tensor, side: int, reach: int, options: dict[str, Any]) -> list[SiteTensors]:
    """Each site's blocks; of slices, only those with a nonzero update. `reach`: number of neighboring rows rotated together."""
    rescale = module.parts.get(RESCALE)
    module.expect(rescale is None or rescale.numel() == module.rows, f"rescale ({module.rows}, 1)")
    if side == 1 and rescale is None:
        module.notes.append("OFT with blocks of size 1 is the identity")
        return []
    pieces = []
    for site in module.place.sites:
        rows = spans(module.place)[site.name]
        if not is_aligned(rows, reach):
            raise module.error(
                f"rotates blocks of {reach} outputs, and '{site.name}' has rows {rows[0][0]} to {rows[-1][1]} of the weight",
                given=reach,
                expected=tuple(rows),
            )
        lengths = None if rescale is None else take(rescale.flatten(), rows)
        pieces.append(_piece(site, take(q, rows, side, q.ndim - 3), lengths, options))
    some = [p for p in pieces if p.state["skew"].any() or (p.state.get("magnitude", torch.ones(1)) != 1).any()]
    return pieces if len(pieces) == 1 else some or pieces[:1]


def _piece(site: WeightSite, q: Tensor, lengths: Tensor | None, options: dict[str, Any]) -> SiteTensors:
    rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], 1)
    state = {"skew": q[..., rows, columns].to(torch.float32)} | ({} if lengths is None else {"magnitude": lengths})
    return SiteTensors(site, {**options, "rescale": lengths is not None}, state)


def _check_rotates_outputs(group: AdapterGroup, adapter: Any, name: str) -> Any:
    """The adapter, if it rotates outputs.

    Raises:
        SaveError: it rotates inputs.
    """
    if not hasattr(adapter, "rotations"):
        raise group.error(
            f"rotates the inputs of its weight, but {name} in this format rotates outputs: train with side='output'",
            given="input",
            expected="output",
        )
    return adapter


def _q(adapter: Any) -> Tensor:
    """Q of an adapter, within its own constraint, in double precision."""
    q = skew(adapter.skew.detach().double(), adapter.size)
    return q if adapter.radius is None else clip_norm(q, adapter.radius)


def _rotation_tensors(group: AdapterGroup, side: int, reach: int, q_of: Callable[[Any], Tensor], *m: int) -> dict[str, Tensor]:
    """Blocks B = Qᵀ / 2 of every site, zero for sites without an adapter, and an alpha that shortens nothing.

    Args:
        side: of the blocks; 0 if sites differ. `q_of`: maps an adapter to the Q with B − Bᵀ = −Q. `m`: of a butterfly.
    """
    place, widths = group.place, [s.d_out // (2 if group.place.swapped else 1) for s in group.place.sites]
    if side == 0 or any(width % reach for width in widths):
        raise group.error(
            f"is a slice of '{place.names[0]}', one weight in this format, and the slices are not whole blocks of one size",
            given=place.names[0],
            expected="blocks",
        )
    none = {s.name: torch.zeros(*m, s.d_out // side, side, side, dtype=torch.float64) for s in place.sites}
    q = put(place, {**none, **{name: q_of(a) for name, a in group.adapters.items()}}, dim=len(m))
    found = {BLOCKS: (-q / 2).to(torch.float32), "alpha": torch.tensor(SLACK * float(q.norm()))}
    lengths = {name: a.magnitude.detach() for name, a in group.adapters.items() if a.magnitude is not None}
    if lengths:
        ones = {s.name: torch.ones(s.d_out, dtype=next(iter(lengths.values())).dtype) for s in place.sites}
        found[RESCALE] = put(place, {**ones, **lengths}).view(-1, 1, *group.ones)
    return found
