"""Turning what a layer gives: the output side of OFT and BOFT, as kohya's tools and LyCORIS have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.cayley import blocks_apply, cayley_change, skew, within
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.seams.effective_weight import effective_tensor
from veneer.injection.sites import WeightSite

from ._swapping import turn_state


class OutputTurn(Adapter):
    """W' = D R W, y' = D R (y − b) + b with R orthogonal: block-diagonal, or a butterfly of such.

    Shapes: `skew` ([m,] blocks, b·(b − 1) / 2), the entries of each Q above its diagonal, R_i = (I + Q_i)(I − Q_i)⁻¹; of m
    components the one with the nearest halves comes first; `magnitude` D (d_out) or None.
    """

    blends: ClassVar[bool] = True
    host: nn.Module

    def __init__(self, site: WeightSite, blocks: Sequence[int], size: int, radius: float | None, rescale: bool) -> None:
        super().__init__()
        self.site, self.size, self.radius = site, size, radius
        self.skew = nn.Parameter(torch.zeros(*blocks, size * (size - 1) // 2))
        self.magnitude = nn.Parameter(torch.ones(site.d_out)) if rescale else None

    def enter(self, tower: nn.Module) -> None:
        """Remember the module, whose bias `output` reads."""
        self.__dict__["host"] = tower.get_submodule(self.site.path)  # no child: the host holds the adapter

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: W x + b, (…, d_out) or (batch, d_out, *size). Gives D R (y − b) + b."""
        bias, dim = effective_tensor(self, self.host, "bias", self.site.rows), y.ndim - 1 - len(self.site.kernel)
        channels = y.movedim(dim, -1)
        if bias is not None:
            channels = channels - bias
        change = self.change(channels.reshape(-1, self.site.d_out)).reshape(channels.shape).movedim(-1, dim)
        return y + change * self.strength

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·(D R W − W), by way of R − I, which is exactly zero at the start."""
        change = self.change(weight.flatten(1).mT).mT
        return weight + (change * self.strength).reshape(weight.shape)

    def taking(self, other: OutputTurn | None) -> dict[str, Tensor]:
        """State with which this turns as `other` does, or not at all. `ValueError` where its blocks do not fit into these."""
        return turn_state(self, other)

    def change(self, rows: Tensor) -> Tensor:
        """D R v − v of each row v of (n, d_out)."""
        change = torch.zeros_like(rows)
        for step, turn in enumerate(self.turns()):
            change = change + blocks_apply(rows + change, turn, spread=2**step)
        return change if self.magnitude is None else (rows + change) * self.magnitude - rows

    def turns(self) -> Tensor:
        """R_i − I of each component, (m, blocks, b, b)."""
        q = skew(self.skew, self.size)
        turn = cayley_change(q if self.radius is None else within(q, self.radius))
        return turn if turn.ndim == 4 else turn.unsqueeze(0)


def refuse_straddling(site: WeightSite, side: int) -> None:
    """Raise if a turn would mix the outputs of two groups of a convolution, which read other inputs.

    Args:
        side: how many neighbouring outputs are turned together.
    Raises:
        ValueError: it is no divisor of a group's outputs.
    """
    if site.groups > 1 and site.d_out // site.groups % side:
        group = site.d_out // site.groups
        message = f"{side} outputs turn together, across groups of {group}; choose smaller blocks, or side='input'"
        raise OptionError(message, option="side", given=side, expected=group)
