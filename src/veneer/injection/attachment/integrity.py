"""Whether a host is still as it was when something was attached: asked before every pass, so asked quickly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..seams.adapter_calls import module_at
from ..seams.seam import HookSeam, Seam

Edge = tuple[nn.Module, str, nn.Module]


class Watch:
    """The modules on the way from the towers to the seams and guards, and the guards' values.

    Args:
        seams: joined. `guards`: (tower, dotted path of an attribute).
    """

    def __init__(self, seams: Sequence[Seam], guards: Iterable[tuple[nn.Module, str]]) -> None:
        self.hooked = [seam for seam in seams if isinstance(seam, HookSeam)]
        self.others = [seam for seam in seams if not isinstance(seam, HookSeam)]
        ways = [(seam.__dict__["tower"], seam.home) for seam in self.hooked]
        self.values: list[tuple[Any, str, Any]] = []
        for tower, path in dict.fromkeys(guards):
            way, _, name = path.rpartition(".")
            owner = module_at(tower, way)
            ways.append((tower, way))
            self.values.append((owner, name, getattr(owner, name)))
        edges = {(id(parent), key): (parent, key, child) for way in dict.fromkeys(ways) for parent, key, child in _edges(*way)}
        self.edges = list(edges.values())

    def unchanged(self, merged: bool) -> bool:
        """True if nothing was replaced or set anew. Without a look at the seams while `merged`: they are away."""
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
