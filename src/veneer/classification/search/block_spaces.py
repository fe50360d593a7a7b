"""Spaces with sizes from a list: any blocks, or as in NOAH the first blocks of each method."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .space import Space
from .sub_network import SubNetwork


class BlockSpace(Space):
    """Each group of blocks has each method with one of its sizes, or without it.

    A sub-network over the budget is reduced by random steps, each to the next smaller size of a method in a group.
    """

    def least_parameters(self) -> int:
        """Parameters of the smallest method in one group."""
        return min(map(self.parameters, self._smallest()))

    @property
    def empty(self) -> SubNetwork:
        """The sub-network without methods."""
        return SubNetwork(tuple((0,) * len(self.sites.groups) for _ in self.sites.methods))

    def largest(self) -> SubNetwork:
        """The sub-network with the largest sizes everywhere."""
        return SubNetwork(tuple(self._row(m, lambda sizes: sizes[-1]) for m in range(len(self.sites.methods))))

    def sample_any(self, rng: random.Random) -> SubNetwork:
        """Samples every size uniformly."""
        return SubNetwork(tuple(self._row(m, lambda sizes: rng.choice((0, *sizes))) for m in range(len(self.sites.methods))))

    def sample(self, rng: random.Random) -> SubNetwork:
        """Samples every size uniformly, then reduces the sub-network to the budget."""
        return self.reduce(self.sample_any(rng), rng)

    def mutate(self, sub: SubNetwork, rng: random.Random, probability: float) -> SubNetwork:
        """Samples each size again with a probability, then reduces the sub-network to the budget."""
        other = self.sample_any(rng)
        rows = (
            tuple(new if rng.random() < probability else old for old, new in zip(*pair, strict=True))
            for pair in zip(sub.sizes, other.sizes, strict=True)
        )
        return self.reduce(SubNetwork(tuple(rows)), rng)

    def cross(self, first: SubNetwork, second: SubNetwork, rng: random.Random) -> SubNetwork:
        """Takes the sizes of each method from either sub-network, then reduces the result to the budget."""
        rows = (rng.choice(pair) for pair in zip(first.sizes, second.sizes, strict=True))
        return self.reduce(SubNetwork(tuple(rows)), rng)

    def reduce(self, sub: SubNetwork, rng: random.Random) -> SubNetwork:
        """Takes random steps to smaller sub-networks until the budget is kept."""
        while self.parameters(sub) > self.budget:
            sub = rng.choice(self.smaller(sub))
        if sub.is_empty:
            return rng.choice([each for each in self._smallest() if self.has(each)])
        return sub

    def smaller(self, sub: SubNetwork) -> list[SubNetwork]:
        """Sub-networks that are one step smaller."""
        return [sub.with_size(m, g, self._next_smaller(m, sub.sizes[m][g])) for m, g in sub.entries()]

    def _next_smaller(self, method: int, size: int) -> int:
        return max((each for each in self.sites.methods[method].sizes if each < size), default=0)

    def _smallest(self) -> list[SubNetwork]:
        """Sub-networks with the smallest size of one method in one group."""
        groups, methods = range(len(self.sites.groups)), self.sites.methods
        present = [(m, g) for m in range(len(methods)) for g in groups if self.sites.group_sites(m, g)]
        return [self.empty.with_size(m, g, methods[m].sizes[0]) for m, g in present]

    def _row(self, method: int, choose: Callable[[tuple[int, ...]], int]) -> tuple[int, ...]:
        sizes = self.sites.methods[method].sizes
        groups = range(len(self.sites.groups))
        return tuple(choose(sizes) if self.sites.group_sites(method, g) else 0 for g in groups)


class PrefixSpace(BlockSpace):
    """NOAH's space: each method is in the first t groups of blocks, with a size in each; t is 0 or a multiple of a quarter.

    Source: Zhang, Zhou, Liu, Neural Prompt Search, 2022, and its code (`supernet_engine_prompt.py`, `evolution.py`).
    Deviations: t may be 0, so that a method can be left out; a mutation also samples the sizes of groups that stay, which the
    paper describes and the code does not; a sub-network over the budget is reduced, not rejected.
    """

    depth_change = 0.4
    """Probability that a mutation samples t again, as in the code."""

    @property
    def depths(self) -> Sequence[int]:
        """The numbers of groups t to choose from."""
        count = len(self.sites.groups)
        return sorted({0, *(round(count * quarter / 4) for quarter in (1, 2, 3, 4))})

    def sample_any(self, rng: random.Random) -> SubNetwork:
        """Samples t for each method, and a size for each of its groups."""
        return SubNetwork(tuple(self._first(row, rng.choice(self.depths)) for row in self._all_sizes(rng)))

    def mutate(self, sub: SubNetwork, rng: random.Random, probability: float) -> SubNetwork:
        """Samples t again with `depth_change`, and each size again with a probability; new groups get a random size."""
        rows = []
        for row, sizes in zip(sub.sizes, self._all_sizes(rng), strict=True):
            depth = rng.choice(self.depths) if rng.random() < self.depth_change else depth_of(row)
            mixed = (new if not old or rng.random() < probability else old for old, new in zip(row, sizes, strict=True))
            rows.append(self._first(tuple(mixed), depth))
        return self.reduce(SubNetwork(tuple(rows)), rng)

    def smaller(self, sub: SubNetwork) -> list[SubNetwork]:
        """Sub-networks with the next smaller size of a method in a group, or the next smaller t of a method."""
        steps = [(m, g, self._next_smaller(m, sub.sizes[m][g])) for m, g in sub.entries()]
        results = [sub.with_size(m, g, size) for m, g, size in steps if size]
        for m, row in enumerate(sub.sizes):
            shallower = [depth for depth in self.depths if depth < depth_of(row)]
            results += [sub.with_row(m, self._first(row, shallower[-1]))] if shallower else []
        return results

    def _smallest(self) -> list[SubNetwork]:
        """Sub-networks with the smallest sizes of one method in the fewest groups that have sites of it."""
        results = []
        for m in range(len(self.sites.methods)):
            row = self._row(m, lambda sizes: sizes[0])
            least = next(depth for depth in self.depths if any(row[:depth]))
            results.append(self.empty.with_row(m, self._first(row, least)))
        return results

    def _all_sizes(self, rng: random.Random) -> list[tuple[int, ...]]:
        """A random size of every method in every group."""
        return [self._row(m, rng.choice) for m in range(len(self.sites.methods))]

    @staticmethod
    def _first(row: Sequence[int], depth: int) -> tuple[int, ...]:
        return (*row[:depth], *(0,) * (len(row) - depth))


def depth_of(row: Sequence[int]) -> int:
    """Number of groups up to the last one with a size."""
    return max((index + 1 for index, size in enumerate(row) if size), default=0)
