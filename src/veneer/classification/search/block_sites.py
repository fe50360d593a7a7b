"""Sites of the methods of a search in each group of blocks, and the trainable parameters that a size costs there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from veneer.injection.attachment.deferred_init import defer_init
from veneer.injection.attachment.plan import plan
from veneer.injection.errors import OptionError, UnsupportedSite
from veneer.injection.method import Adapter
from veneer.injection.sites import Site
from veneer.injection.towers import towers_of

from .search_methods import SearchMethod

SPINDLE_GROUPS = 4
LARGEST = 1024
"""Largest size of a method whose size is not from a list."""


class BlockSites:
    """Groups of consecutive blocks of a model, with the sites of each method in them.

    Sites outside blocks are not part of a search.

    Args:
        model: the classifier's model. `methods`: of the search.
        groups: number of groups (default: one for each block; with `spindle` 4, or one for each block of a smaller model).
        spindle: groups in the middle have more blocks.

    Attributes:
        blocks: number of blocks. `groups`: (first block, end) of each group.
    Raises:
        UnsupportedSite: a method cannot adapt the model, or none of its blocks.
        OptionError: more groups than blocks, or a method whose parameters several blocks share.
    """

    def __init__(self, model: Any, methods: Sequence[SearchMethod], groups: int | None = None, *, spindle: bool = False) -> None:
        self.methods = tuple(methods)
        self._towers = towers_of(model)
        self._counts: dict[tuple[int, int], Counter[int]] = {}
        self._sites = [self._supported_sites(method) for method in self.methods]
        self.blocks = max(site.depth or 0 for sites in self._sites for site in sites) + 1
        count = groups or (min(SPINDLE_GROUPS, self.blocks) if spindle else self.blocks)
        if not 1 <= count <= self.blocks:
            message = f"groups is {count}; expected 1 to {self.blocks}, the number of blocks of the model."
            raise OptionError(message, option="groups", given=count, expected=self.blocks)
        self.groups = group_bounds(self.blocks, count, spindle=spindle)

    def group_sites(self, method: int, group: int) -> list[Site]:
        """Sites of a method in one group of blocks."""
        first, end = self.groups[group]
        return [site for site in self._sites[method] if site.depth in range(first, end)]

    def count(self, method: int, group: int, size: int) -> int:
        """Trainable parameters of a method with a size in one group of blocks."""
        if not size:
            return 0
        if (method, size) not in self._counts:
            counts = Counter[int]()
            for site, adapter in self._parts(self.methods[method], size):
                counts[site.depth or 0] += sum(p.numel() for p in adapter.parameters())
            self._counts[method, size] = counts
        return sum(self._counts[method, size][depth] for depth in range(*self.groups[group]))

    def largest_size(self, method: int, groups: Sequence[int], parameters: float) -> int:
        """Largest size with at most so many parameters in these groups together; 0 if no size has."""

        def fits(size: int) -> bool:
            return sum(self.count(method, group, size) for group in groups) <= parameters

        entry = self.methods[method]
        if not entry.is_scalable:
            return max((size for size in entry.sizes if fits(size)), default=0)
        low, high = 0, 1
        while high <= LARGEST and fits(high):
            low, high = high, 2 * high
        high = min(high, LARGEST + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(method.name for method in self.methods)

    def _parts(self, method: SearchMethod, size: int) -> list[tuple[Site, Adapter]]:
        """Sites in blocks, with new adapters of a size whose parameters are not initialized."""
        with defer_init():
            parts = plan(self._towers, method.build(size), method.where, ()).parts
        return [(site, adapter) for site, adapter in parts if site.depth is not None]

    def _supported_sites(self, method: SearchMethod) -> list[Site]:
        """Sites of a method in blocks."""
        parts = self._parts(method, method.sizes[-1])
        if not parts:
            message = f"{method.name}: the model has no site in a block for it. Leave it out of --methods, or select with where=."
            host = self._towers[0].host.name
            raise UnsupportedSite(message, method=method.name, host=host, given=(), expected="sites in blocks")
        if any(hasattr(adapter, "shared") for _, adapter in parts):
            message = (
                f"methods: {method.name} has parameters that several blocks share, so that a block alone has no size. Leave it "
                "out, or choose options without them, such as prefix_tuning(hidden=0)."
            )
            raise OptionError(message, option="methods", method=method.name, given=method.name, expected="parameters by block")
        option = method.size_option
        if option in method.build(method.sizes[-1]).shared_options and (method.is_scalable or len(method.sizes) > 1):
            message = (
                f"methods: {option} of {method.name} must be the same in all blocks. Set it among its options, such as "
                f"{method.name}({option}={method.sizes[0]})."
            )
            raise OptionError(message, option=option or "", method=method.name, given=method.sizes, expected="one size")
        return [site for site, _ in parts]


def group_bounds(blocks: int, groups: int, *, spindle: bool = False) -> tuple[tuple[int, int], ...]:
    """(First block, end) of consecutive groups: equally many blocks each, or with `spindle` more in the middle.

    The share of spindle group i of G is proportional to min(i, G - 1 - i) + 1.

    >>> group_bounds(12, 4, spindle=True)
    ((0, 2), (2, 6), (6, 10), (10, 12))
    """
    weights = [min(i, groups - 1 - i) + 1 if spindle else 1 for i in range(groups)]
    ends = [round(blocks * sum(weights[: i + 1]) / sum(weights)) for i in range(groups)]
    for i in range(groups):  # at least one block each
        ends[i] = min(max(ends[i], i + 1), blocks - (groups - 1 - i))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))
