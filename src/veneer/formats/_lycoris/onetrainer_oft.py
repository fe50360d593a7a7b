"""OneTrainer's OFT, which rotates inputs, under the module names of the LyCORIS format."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from .codec import AdapterGroup, Codec, LycorisModule, Shapes, SiteTensors

ROTATION, SCALED = "oft_R.weight", "oft_R.scaled_oft"
TERMS = 5  # number of terms of OneTrainer's Neumann series


class InputOFTCodec(Codec):
    """`oft_R.weight` (n, b(b−1)/2), the entries of each Q above its diagonal, n·b = d_in·k·k or n = 1 for one shared block.

    W' = W Rᵀ of a linear layer, W' = W R of a convolution, with R = I + 2Q + 2Q² + 2Q³ + Q⁴ per block. `oft_R.scaled_oft`
    marks Scaled OFT, whose Q is divided by 2·√(b − 1). There is no alpha. Read only.
    Source: Nerogar/OneTrainer `modules/module/oft_utils.py`, `modules/module/LoRAModule.py`.
    """

    method: ClassVar[str] = "oft"
    algo: ClassVar[str] = "oft"
    suffixes: ClassVar[tuple[str, ...]] = (ROTATION, SCALED)

    def matches(self, shapes: Shapes) -> bool:
        return ROTATION in shapes

    def read(self, module: LycorisModule) -> list[SiteTensors]:
        entries, site = module.parts[ROTATION], module.first
        width = math.prod(site.weight_shape[1:])
        size = round((1 + math.sqrt(1 + 8 * entries.shape[1])) / 2) if entries.ndim == 2 else 0
        whole = size > 1 and width % size == 0 and entries.shape[1] == size * (size - 1) // 2
        share = whole and len(entries) == 1 and size != width
        module.expect(whole and (share or len(entries) * size == width), f"{ROTATION} (n, b(b−1)/2) with n·b = {width}")
        scale = 1 / (2 * math.sqrt(size - 1)) if _has_scaled_mark(module) else 1.0
        skew = entries.float() * (-scale if site.kernel else scale)
        options = {"block_size": size, "share": share, "coft": None, "rescale": False, "neumann_terms": TERMS, "side": "input"}
        return [SiteTensors(each, options, {"skew": skew}) for each in module.place.sites]

    def write(self, group: AdapterGroup) -> dict[str, Tensor]:
        raise group.error("rotates its inputs, which this format supports for reading only")


def _has_scaled_mark(module: LycorisModule) -> bool:
    mark = module.parts.get(SCALED)
    module.expect(mark is None or mark.numel() == 1, f"{SCALED} of one element")
    return mark is not None and bool(mark)
