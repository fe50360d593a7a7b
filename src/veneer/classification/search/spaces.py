"""The spaces of `veneer search` by name."""

from __future__ import annotations

from .block_sites import BlockSites
from .block_spaces import BlockSpace, PrefixSpace
from .space import Space
from .spindle_space import SpindleSpace

SPACES: dict[str, type[Space]] = {"noah": PrefixSpace, "blocks": BlockSpace, "s4": SpindleSpace}


def build_space(name: str, sites: BlockSites, budget: int) -> Space:
    """The space of a name, with a budget of trainable parameters.

    Raises:
        OptionError: the budget is below the smallest sub-network.
    """
    return SPACES[name](sites, budget)
