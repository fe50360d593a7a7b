"""OneTrainer's OFT, which rotates inputs, under the module names of LyCORIS' layout."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from .codec import Codec, Group, Module, Piece, Shapes

ROTATION, SCALED = "oft_R.weight", "oft_R.scaled_oft"
TERMS = 5  # of OneTrainer's Neumann series


class InputOFTCodec(Codec):
    """`oft_R.weight` (n, b(b−1)/2), the entries of each Q above its diagonal, n·b = d_in·k·k or n = 1 for one shared block.

    W' = W Rᵀ of a linear layer, W' = W R of a convolution, with R = I + 2Q + 2Q² + 2Q³ + Q⁴ per block. `oft_R.scaled_oft`
    marks Scaled OFT, whose Q is divided by 2·√(b − 1). There is no alpha. Read only.
    Source: Nerogar/OneTrainer `modules/module/oft_utils.py`, `modules/module/LoRAModule.py`.
    """

    method: ClassVar[str] = "oft"
    algo: ClassVar[str] = "oft"
    ends: ClassVar[tuple[str, ...]] = (ROTATION, SCALED)

    def mine(self, shapes: Shapes) -> bool:
        return ROTATION in shapes

    def read(self, module: Module) -> list[Piece]:
        entries, site = module.parts[ROTATION], module.first
        width = math.prod(site.weight_shape[1:])
        size = round((1 + math.sqrt(1 + 8 * entries.shape[1])) / 2) if entries.ndim == 2 else 0
        whole = size > 1 and width % size == 0 and entries.shape[1] == size * (size - 1) // 2
        share = whole and len(entries) == 1 and size != width
        module.expect(whole and (share or len(entries) * size == width), f"{ROTATION} (n, b(b−1)/2) with n·b = {width}")
        scale = 1 / (2 * math.sqrt(size - 1)) if _is_scaled(module) else 1.0
        skew = entries.float() * (-scale if site.kernel else scale)
        options = {"block_size": size, "share": share, "coft": None, "rescale": False, "neumann_terms": TERMS, "side": "input"}
        return [Piece(each, options, {"skew": skew}) for each in module.place.sites]

    def write(self, group: Group) -> dict[str, Tensor]:
        raise group.refuse("rotates its inputs, which is only read from this layout")


def _is_scaled(module: Module) -> bool:
    mark = module.parts.get(SCALED)
    module.expect(mark is None or mark.numel() == 1, f"{SCALED} of one element")
    return mark is not None and bool(mark)
