"""EVA: LoRA initialized from the principal components of the layers' inputs, with ranks by their explained variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.functional.principal_components import PrincipalComponents
from veneer.injection.errors import EmptySelection
from veneer.injection.sites import Site, WeightSite

from ._low_rank import LoRAAdapter


class ExplainedVarianceAdapter(LoRAAdapter):
    """A LoRA on a linear layer, whose A is zero until it is initialized from the layer's inputs.

    A has as many rows as the site can get at most. Those beyond its rank are zero and stay zero in training, because neither
    their gradients nor those of their columns of B differ from zero. `drop_zero_rows` removes them.

    Attributes:
        components: the components of the inputs while they are collected, else None.
    """

    components: PrincipalComponents | None = None

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(site, rank, scaling, dropout)
        self.down = nn.Parameter(torch.zeros(self.down.shape))

    @property
    def is_selected(self) -> bool:
        """True if A is initialized."""
        return bool(self.down.any())

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """As in `LoRAAdapter`."""
        if self.components is not None:
            self.components.update(x.detach().reshape(-1, x.shape[-1]))
        return super().output(x, y, overwrite)

    @torch.no_grad()
    def initialize(self, vectors: Tensor) -> None:
        """Writes the first rows of A."""
        self.down.zero_()
        self.down[: len(vectors)] = vectors

    @torch.no_grad()
    def drop_zero_rows(self) -> int:
        """Removes the rows of zeros at the end of A, but not the first row; returns the remaining rank."""
        used = self.down.any(1).nonzero()
        rank = int(used.max()) + 1 if len(used) else 1
        self.down, self.up = nn.Parameter(self.down[:rank].clone()), nn.Parameter(self.up[:, :rank].clone())
        return rank


def widest_rank(site: WeightSite, rank: int, rho: float) -> int:
    """Rows of A: the highest rank that a site can get."""
    return max(1, min(round(rank * rho), site.d_in))


def initialize_from_inputs(
    parts: Sequence[tuple[Site, ExplainedVarianceAdapter]], ranks: Sequence[int], losses: Iterable[Tensor], samples: int
) -> None:
    """Initializes A of all sites from the inputs of their layers in forward passes of single samples.

    As many components as `ranks` have in total get a row: those that explain most of the variance of a layer, and the first one.

    Args:
        ranks: average ranks. `losses`: of single samples, see `Attachment.select`. `samples`: how many are read at most.
    Raises:
        EmptySelection: a layer gets no inputs.
    """
    adapters = [adapter for _, adapter in parts]
    seen = [PrincipalComponents(len(adapter.down)) for adapter in adapters]
    try:
        for adapter, components in zip(adapters, seen, strict=True):
            adapter.components = components
        count = sum(1 for _ in itertools.islice(losses, samples))
    finally:
        for adapter in adapters:
            adapter.components = None
    unseen = [site.name for (site, _), components in zip(parts, seen, strict=True) if not components.seen]
    if unseen:
        message = f"lora: init='eva': {unseen[0]} got no inputs from {count} samples; expected a pass of its layer in each."
        raise EmptySelection(message, where=unseen[0], given=count, expected="inputs")
    ratios = [components.ratios.nan_to_num().cpu() for components in seen]
    for adapter, components, rank in zip(adapters, seen, allocate_ranks(ratios, sum(ranks)), strict=True):
        adapter.initialize(components.vectors[:rank].to(adapter.down))


def allocate_ranks(ratios: Sequence[Tensor], budget: int) -> list[int]:
    """How many of the components of each site are among the `budget` ones with the highest ratios; at least one per site."""
    first = torch.cat([torch.arange(len(r)) == 0 for r in ratios])
    order = torch.cat([*ratios]).masked_fill(first, torch.inf).argsort(descending=True, stable=True)[:budget]
    owner = torch.cat([torch.full((len(r),), i) for i, r in enumerate(ratios)])
    return torch.bincount(owner[order], minlength=len(ratios)).tolist()


def options_of_rank(rank: int, scaling: float, rslora: bool) -> dict[str, Any]:
    """Options of a plain LoRA with this rank and scale."""
    return {"rank": rank, "alpha": scaling * (math.sqrt(rank) if rslora else rank), "init": "kaiming"}
