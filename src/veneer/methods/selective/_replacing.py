"""Tensors of the host that are trained themselves, on a base that stays as it was."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.attachment.deferred_init import values_follow
from veneer.injection.method import Adapter
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import ParamSite, WeightSite


class Replacing(Adapter):
    """W' = W + s·(V − W) with `value` V, as large as W; V starts as W. At strength 1 W' is V, bitwise, at 0 it is W.

    V is in single precision, or wider where W is. It is saved whole, so that a file says the same on a host with another W.
    """

    replaces: ClassVar[bool] = True

    def __init__(self, site: WeightSite | ParamSite) -> None:
        super().__init__()
        self.site = site
        self.value = nn.Parameter(torch.empty(shape_of(site)))

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Start from the host's own values."""
        if values_follow():
            return
        weight = base_tensor(tower, self.site.path, self.site.param)
        self.value.copy_(weight if self.site.rows is None else weight[slice(*self.site.rows)])

    def weight(self, weight: Tensor) -> Tensor:
        """V; the seam blends it with W."""
        return self.value


def shape_of(site: WeightSite | ParamSite) -> tuple[int, ...]:
    """Of the tensor, or of the rows of it that the site means."""
    return site.weight_shape if isinstance(site, WeightSite) else site.shape


def size_of(site: WeightSite | ParamSite) -> int:
    """How many numbers that are."""
    return math.prod(shape_of(site))
