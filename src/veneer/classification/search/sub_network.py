"""A sub-network: the size of each method in each group of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class SubNetwork:
    """Sizes of the methods in the groups of blocks.

    Args:
        sizes: for each method its size in each group; 0 without it.
    """

    sizes: tuple[tuple[int, ...], ...]

    @property
    def is_empty(self) -> bool:
        """True if no group has a method."""
        return not any(map(any, self.sizes))

    def entries(self) -> list[tuple[int, int]]:
        """Pairs of method and group with a size above 0."""
        return [(m, g) for m, row in enumerate(self.sizes) for g, size in enumerate(row) if size]

    def with_size(self, method: int, group: int, size: int) -> SubNetwork:
        """The sub-network with another size of one method in one group."""
        row = self.sizes[method]
        return self.with_row(method, (*row[:group], size, *row[group + 1 :]))

    def with_row(self, method: int, row: Sequence[int]) -> SubNetwork:
        """The sub-network with other sizes of one method."""
        return SubNetwork((*self.sizes[:method], tuple(row), *self.sizes[method + 1 :]))

    def as_dict(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Method name to its sizes."""
        return {name: list(row) for name, row in zip(names, self.sizes, strict=True)}

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Sequence[int]], names: Sequence[str]) -> SubNetwork:
        """Inverse of `as_dict`."""
        return cls(tuple(tuple(sizes[name]) for name in names))

    def text(self, names: Sequence[str]) -> str:
        """The sizes by group, such as `lora 1-1-0-0, vpt 0-5-5-0`; methods without any are left out."""
        rows = zip(names, self.sizes, strict=True)
        return ", ".join(f"{name} {'-'.join(map(str, row))}" for name, row in rows if any(row)) or "none"
