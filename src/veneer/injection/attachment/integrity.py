"""Checks before every forward pass whether the host still has the modules and flags it had at attach. Must be fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..seams.adapter_calls import module_at
from ..seams.seam import HookSeam, Seam

Edge = tuple[nn.Module, str, nn.Module]


class IntegrityCheck:
    """The chain of modules from the towers to every seam and guard, and the guards' values.

    Args:
        seams: installed. `guards`: (tower, dotted path of an attribute).
    """

    def __init__(self, seams: Sequence[Seam], guards: Iterable[tuple[nn.Module, str]]) -> None:
        self.hooked = [seam for seam in seams if isinstance(seam, HookSeam)]
        self.others = [seam for seam in seams if not isinstance(seam, HookSeam)]
        chains = [(seam.__dict__["tower"], seam.home) for seam in self.hooked]
        self.values: list[tuple[Any, str, Any]] = []
        for tower, path in dict.fromkeys(guards):
            chain, _, name = path.rpartition(".")
            owner = module_at(tower, chain)
            chains.append((tower, chain))
            self.values.append((owner, name, getattr(owner, name)))
        edges = {
            (id(parent), key): (parent, key, child) for chain in dict.fromkeys(chains) for parent, key, child in _edges(*chain)
        }
        self.edges = list(edges.values())

    def is_intact(self, merged: bool) -> bool:
        """True if no module was replaced and no guard changed. Seams are skipped while `merged`, because they are removed."""
        if not all(parent._modules.get(key) is child for parent, key, child in self.edges):
            return False
        if not all(getattr(owner, name) == value for owner, name, value in self.values):
            return False
        return merged or (all(seam.is_in_place() for seam in self.hooked) and all(seam.is_intact() for seam in self.others))


def _edges(tower: nn.Module, path: str) -> Iterator[Edge]:
    parent = tower
    for key in path.split(".") if path else ():
        child = module_at(parent, key)
        yield parent, key, child
        parent = child
