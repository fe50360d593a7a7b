"""Rotates the output of a layer: the output side of OFT and BOFT, as in kohya's tools and LyCORIS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.cayley import blocks_apply, cayley_change, clip_norm, skew
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.seams.effective_weight import effective_tensor
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._state_transfer import rotation_state


class OutputRotation(Adapter):
    """W' = D R W, y' = D R (y − b) + b with R orthogonal: block-diagonal, or a butterfly of such matrices.

    Shapes: `skew` ([m,] blocks, b·(b − 1) / 2), the entries of each Q above its diagonal, R_i = (I + Q_i)(I − Q_i)⁻¹; of m
    components the one with the smallest stride comes first; `magnitude` D (d_out) or None.
    """

    applies_strength: ClassVar[bool] = True
    host: nn.Module

    def __init__(self, site: WeightSite, blocks: Sequence[int], size: int, radius: float | None, rescale: bool) -> None:
        super().__init__()
        self.site, self.size, self.radius = site, size, radius
        self.skew = nn.Parameter(torch.zeros(*blocks, size * (size - 1) // 2))
        self.magnitude = nn.Parameter(torch.ones(site.d_out)) if rescale else None

    def enter(self, tower: nn.Module) -> None:
        """Keeps a reference to the module, whose bias `output` reads."""
        self.__dict__["host"] = tower.get_submodule(self.site.path)  # not a submodule: the host contains the adapter

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: W x + b, (…, d_out) or (batch, d_out, *size). Returns D R (y − b) + b."""
        bias, dim = effective_tensor(self, self.host, "bias", self.site.rows), y.ndim - 1 - len(self.site.kernel)
        channels = y.movedim(dim, -1)
        if bias is not None:
            channels = channels - bias
        change = self.change(channels.reshape(-1, self.site.d_out)).reshape(channels.shape).movedim(-1, dim)
        return y + change * self.strength

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·(D R W − W), computed from R − I, which is exactly zero initially."""
        change = self.change(weight.flatten(1).mT).mT
        return weight + (change * self.strength).reshape(weight.shape)

    def state_from(self, other: OutputRotation | None) -> dict[str, Tensor]:
        """State with which this rotates as `other` does, or not at all. `ValueError` if its blocks do not match these."""
        return rotation_state(self, other)

    def change(self, rows: Tensor) -> Tensor:
        """D R v − v of each row v of (n, d_out)."""
        change = torch.zeros_like(rows)
        for step, rotation in enumerate(self.rotations()):
            change = change + blocks_apply(rows + change, rotation, spread=2**step)
        return change if self.magnitude is None else (rows + change) * self.magnitude - rows

    def rotations(self) -> Tensor:
        """R_i − I of each component, (m, blocks, b, b)."""
        q = skew(self.skew, self.size)
        rotation = cayley_change(q if self.radius is None else clip_norm(q, self.radius))
        return rotation if rotation.ndim == 4 else rotation.unsqueeze(0)


def reject_straddling_blocks(site: WeightSite, side: int) -> None:
    """Raises if a rotation would mix the outputs of two groups of a convolution, which read different inputs.

    Args:
        side: number of neighboring outputs that are rotated together.
    Raises:
        ValueError: it does not divide a group's outputs.
    """
    if site.groups > 1 and site.d_out // site.groups % side:
        group = site.d_out // site.groups
        message = f"blocks of {side} outputs straddle groups of {group}; choose smaller blocks, or side='input'"
        raise OptionError(message, option="side", given=side, expected=group)
