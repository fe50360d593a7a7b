"""S4's design space: groups in the form of a spindle, equally many parameters in every layer, and methods by group."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from functools import cached_property

from .block_sites import BlockSites
from .space import Space
from .sub_network import SubNetwork

KINDS = {"adapter": ("adaptformer", "pfeiffer", "houlsby"), "lora": ("lora",), "prefix": ("prefix_tuning",), "bias": ("bitfit",)}
S4 = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "bias"), ("prefix", "bias", "lora"))
"""The kinds of methods of the four groups in the model S4 of the paper."""


class SpindleSpace(Space):
    """Each group of blocks has one or more of the methods; the budget sets their sizes.

    Every block gets budget / blocks parameters, and each of its methods the same share of them, with the largest size for which
    they suffice. A method whose smallest size needs more than its share leaves the group, and the others divide the share again.

    Source: Chen et al., Parameter-Efficient Fine-Tuning Design Spaces, ICLR 2023: spindle grouping, uniform allocation, all
    groups tuned, methods by group. The paper's S4 is evaluated first if the methods have its four kinds and there are four
    groups. Deviation: the paper chooses the groups' methods one group after the other, by random samples; here all evolve.
    """

    def __init__(self, sites: BlockSites, budget: int) -> None:
        super().__init__(sites, budget)
        self._known_sizes: dict[tuple[int, frozenset[int]], dict[int, int]] = {}

    def least_parameters(self) -> int:
        """The budget from which each block's share suffices for one method."""
        sites = self.sites
        least = 0
        for group, (first, end) in enumerate(sites.groups):
            costs = [sites.count(m, group, sites.methods[m].sizes[0] if not sites.methods[m].is_scalable else 1)
                     for m in range(len(sites.methods)) if sites.group_sites(m, group)]  # fmt: skip
            least = max(least, -(-min(costs) * sites.blocks // (end - first)) if costs else 0)
        return least

    def initial(self) -> Sequence[SubNetwork]:
        """The paper's S4, if the methods have its kinds."""
        names = self.sites.names
        kinds = {kind: next((i for i, name in enumerate(names) if name in known), None) for kind, known in KINDS.items()}
        if len(self.sites.groups) != len(S4) or None in kinds.values():
            return ()
        return (self.allocate([{index for kind in group if (index := kinds[kind]) is not None} for group in S4]),)

    def sample_any(self, rng: random.Random) -> SubNetwork:
        """As `sample`: the budget sets the sizes."""
        return self.sample(rng)

    def sample(self, rng: random.Random) -> SubNetwork:
        """Samples methods of each group, each with probability one half."""
        return self.allocate([self._some({m for m in members if rng.random() < 0.5}, g, rng) for g, members in self._members])

    def mutate(self, sub: SubNetwork, rng: random.Random, probability: float) -> SubNetwork:
        """Adds or removes each method of each group with a probability."""
        chosen = []
        for group, members in self._members:
            current = _methods_of(sub, group)
            changed = {m for m in members if (m in current) != (rng.random() < probability)}
            chosen.append(self._some(changed, group, rng))
        return self.allocate(chosen)

    def cross(self, first: SubNetwork, second: SubNetwork, rng: random.Random) -> SubNetwork:
        """Takes the methods of each group from either sub-network."""
        return self.allocate([_methods_of(rng.choice((first, second)), g) for g in range(len(self.sites.groups))])

    def allocate(self, chosen: Sequence[set[int]]) -> SubNetwork:
        """The sub-network with these methods in each group, and the sizes that the budget allows."""
        columns = [self._sizes(group, members) for group, members in enumerate(chosen)]
        methods = range(len(self.sites.methods))
        return SubNetwork(tuple(tuple(column.get(m, 0) for column in columns) for m in methods))

    def _sizes(self, group: int, chosen: Collection[int]) -> dict[int, int]:
        """Sizes of the methods of one group."""
        key = group, frozenset(chosen)
        if key not in self._known_sizes:
            self._known_sizes[key] = self._largest_sizes(group, chosen)
        return self._known_sizes[key]

    def _largest_sizes(self, group: int, chosen: Collection[int]) -> dict[int, int]:
        first, end = self.sites.groups[group]
        share = self.budget * (end - first) / self.sites.blocks
        remaining = sorted(chosen)
        while remaining:
            sizes = {m: self.sites.largest_size(m, [group], share / len(remaining)) for m in remaining}
            too_large = [m for m in remaining if not sizes[m]]
            if not too_large:
                return sizes
            remaining.remove(max(too_large, key=lambda m: self.sites.count(m, group, self.sites.methods[m].sizes[0])))
        return {}

    @cached_property
    def _members(self) -> list[tuple[int, list[int]]]:
        """Groups with the methods whose smallest size is within the share of the group."""
        groups, methods = range(len(self.sites.groups)), range(len(self.sites.methods))
        return [(g, [m for m in methods if self.sites.group_sites(m, g) and self._sizes(g, {m})]) for g in groups]

    def _some(self, chosen: set[int], group: int, rng: random.Random) -> set[int]:
        """The methods, or a random one of the group if there are none."""
        members = self._members[group][1]
        return chosen or ({rng.choice(members)} if members else set())


def _methods_of(sub: SubNetwork, group: int) -> set[int]:
    return {m for m, row in enumerate(sub.sizes) if row[group]}
