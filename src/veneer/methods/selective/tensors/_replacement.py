"""Adapters that replace tensors of the host by trainable ones, without modifying the base."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.method import Adapter
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import ParamSite, WeightSite


class ReplacementAdapter(Adapter):
    """W' = W + s·(V − W) with `value` V of W's shape, initialized to W. At strength 1 W' is V, bitwise, at 0 it is W.

    V is in float32, or wider if W is. It is saved whole, so that a file gives the same V on a host with another W.
    """

    replaces: ClassVar[bool] = True

    def __init__(self, site: WeightSite | ParamSite) -> None:
        super().__init__()
        self.site = site
        self.value = nn.Parameter(torch.empty(shape_of(site)))

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Copies the host's values."""
        if is_init_deferred():
            return
        weight = base_tensor(tower, self.site.path, self.site.param)
        self.value.copy_(weight if self.site.rows is None else weight[slice(*self.site.rows)])

    def weight(self, weight: Tensor) -> Tensor:
        """V; the seam blends it with W."""
        return self.value


def shape_of(site: WeightSite | ParamSite) -> tuple[int, ...]:
    """Shape of the tensor, or of the site's rows of it."""
    return site.weight_shape if isinstance(site, WeightSite) else site.shape


def size_of(site: WeightSite | ParamSite) -> int:
    """Number of parameters."""
    return math.prod(shape_of(site))
