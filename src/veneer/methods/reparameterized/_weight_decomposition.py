"""Weight decomposition as in DoRA, around any additive weight update: a magnitude per output or per input channel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.injection.method import Adapter
from veneer.injection.sites import WeightSite

NormAxis = Literal["output", "input"]
AXES: tuple[NormAxis, ...] = ("output", "input")


def magnitude_count(site: WeightSite, axis: NormAxis) -> int:
    """Number of magnitudes: d_out, or d_in / groups."""
    return site.d_out if axis == "output" else site.d_in // site.groups


def channel_norms(weight: Tensor, axis: NormAxis) -> Tensor:
    """‖W‖ per output, (d_out,), or per input channel, (d_in / groups,), over all other dimensions of W."""
    channels = 0 if axis == "output" else 1
    return torch.linalg.vector_norm(weight.movedim(channels, 0).flatten(1), dim=1)


class DecomposedAdapter(Adapter):
    """W' = m·(W + s·ΔW) / ‖W + s·ΔW‖, the norm per output or per input channel; weight form only.

    Shapes: `magnitude_delta` (d_out,) or (d_in / groups,), which is m − ‖W‖. The norm is treated as constant in the backward
    pass. A subclass sets `site` and `scaling`, defines `delta()` and calls `decompose`.
    """

    applies_strength: ClassVar[bool] = True
    site: WeightSite
    scaling: float
    norm_axis: NormAxis
    magnitude_delta: nn.Parameter

    def decompose(self, axis: NormAxis) -> None:
        """Adds the magnitudes."""
        self.norm_axis = axis
        self.magnitude_delta = nn.Parameter(torch.zeros(magnitude_count(self.site, axis)))

    def delta(self) -> Tensor:
        """ΔW in the weight's shape, without the scale."""
        raise NotImplementedError

    def weight(self, weight: Tensor) -> Tensor:
        """m·(W + s·ΔW) / ‖W + s·ΔW‖, at strength t blended with W."""
        change = self.delta() * self.scaling
        gain = self._gain(weight, change)
        return weight * (1 + self.strength * (gain - 1)) + change * (self.strength * gain)

    def _gain(self, weight: Tensor, change: Tensor) -> Tensor:
        """m / ‖W + s·ΔW‖, broadcastable to W. A zero channel of W has no direction and is scaled by 1 + m."""
        with torch.no_grad(), torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
            base = weight.to(change.dtype)
            before, after = channel_norms(base, self.norm_axis), channel_norms(base + change, self.norm_axis)
        some = before > 0
        gain = (torch.where(some, before, 1.0) + self.magnitude_delta) / torch.where(some, after, 1.0)
        channels = 0 if self.norm_axis == "output" else 1
        return gain.view(*(-1 if side == channels else 1 for side in range(weight.ndim)))
