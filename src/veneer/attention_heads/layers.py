"""The attention layers of a model, found by their output projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.injection.errors import VeneerError
from veneer.injection.sites import BranchSite, Site, StreamSite, WeightSite
from veneer.injection.towers import towers_of

ROLES = ("attn.out", "xattn.out")


class HeadsError(VeneerError):
    """The attention heads of a model cannot be studied, or a head does not exist."""


@dataclass(frozen=True)
class AttentionLayer:
    """An attention and where its tokens are.

    Args:
        name: of the site of its output projection. `path`: of the module that computes attention, in the tower.
        heads: number of heads. `depth`: index of the block, or None.
        cross: True if keys come from other tokens than queries.
        tower: root module. `prefix_tokens`: class and register tokens before the patches. `grid`: (height, width) of the
            patches, or None.
    """

    name: str
    path: str
    heads: int
    depth: int | None
    cross: bool
    tower: nn.Module
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

    @property
    def module(self) -> nn.Module:
        """The module that computes attention."""
        return self.tower.get_submodule(self.path)


def attention_layers(model: Any) -> list[AttentionLayer]:
    """The attention layers of a model, or of the main tower of a pipeline, in order.

    Args:
        model: a model or pipeline with a host.
    Raises:
        HeadsError: none of its layers states the number of its heads, as in convolutional networks.
    """
    tower = next((tower for tower in towers_of(model) if tower.main), None)
    sites: Sequence[Site] = tower.sites if tower else ()
    layers = [
        AttentionLayer(
            site.name, site.attention, site.heads, site.depth, site.role == "xattn.out", tower.module, *_tokens(sites, site)
        )
        for site in sites
        if tower and isinstance(site, WeightSite) and site.role in ROLES and site.heads and site.attention
    ]
    if not layers:
        message = f"{type(model).__name__} has no attention heads; expected a vision transformer, a CLIP model or a UNet."
        raise HeadsError(message, where=type(model).__name__, given=0, expected="attention")
    return layers


def _tokens(sites: Sequence[Site], layer: WeightSite) -> tuple[int, tuple[int, int] | None]:
    """Prefix tokens and grid of the block of a layer."""
    for site in sites:
        if isinstance(site, (BranchSite, StreamSite)) and (site.depth, site.tower) == (layer.depth, layer.tower) and site.grid:
            return site.prefix_tokens, site.grid
    return 0, None
