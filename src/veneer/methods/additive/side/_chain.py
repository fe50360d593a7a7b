"""State passed from block to block beside the residual stream, within one forward pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.injection.errors import HostChanged
from veneer.injection.sites import StreamSite

State = tuple[Tensor, ...]
Key = tuple[str, StorageWeakRef, int, torch.Size]


@dataclass(frozen=True)
class Link:
    """Position of a block: number of its chain, index in it, the preceding site, and the length of the chain."""

    chain: int
    index: int
    before: str | None
    length: int

    @property
    def last(self) -> bool:
        """True for the last block of the chain."""
        return self.index == self.length - 1


class PassProgress(NamedTuple):
    """Progress of a forward pass: the last site, the state after it, and an identifier of the pass if it may be recomputed."""

    site: str
    state: State
    one: object


class SavedState(NamedTuple):
    """The state before a block in one forward pass."""

    state: State
    one: object


class RunningPasses:
    """State of the forward passes in progress. Copies start empty."""

    def __init__(self) -> None:
        self.now: dict[tuple[int, int], PassProgress] = {}
        self.kept: dict[Key, SavedState] = {}

    def __reduce__(self) -> tuple[type[RunningPasses], tuple[()]]:
        return RunningPasses, ()

    def prune(self) -> None:
        """Drops passes whose features have been freed."""
        for key in [key for key in self.kept if key[1].expired()]:
            del self.kept[key]

    def forget(self, one: object) -> None:
        """Drops the states of a pass after its backward pass; keeps its empty initial state, which identifies its first block."""
        for key in [key for key, kept in self.kept.items() if kept.one is one and kept.state]:
            del self.kept[key]


class Chain(nn.Module):
    """The blocks of a tower in order, and the state passed through them.

    A new chain begins where stage, width or layout change; state does not pass from one chain to the next.

    A block may be recomputed in the backward pass (gradient checkpointing), in reverse order and possibly after another forward
    pass. It is identified by the memory of its input, and receives the state that preceded it in the original pass.
    """

    def __init__(self, sites: Sequence[StreamSite]) -> None:
        super().__init__()
        found: dict[tuple[object, ...], list[str]] = {}
        for site in sites:
            found.setdefault((site.tower, site.stage, site.width, site.layout), []).append(site.name)
        self.links = {
            name: Link(chain, i, names[i - 1] if i else None, len(names))
            for chain, names in enumerate(found.values())
            for i, name in enumerate(names)
        }
        self.running = RunningPasses()

    def carry(self, name: str, x: Tensor, step: Callable[[State], State], group: int = 0) -> State:
        """The state after a block.

        Args:
            name: of the site. `x`: the block's input, uncast.
            step: maps the state before the block, empty for the first, to the state after it.
            group: index of the part of a mixed batch.
        Raises:
            HostChanged: the preceding block did not run before it in this pass.
        """
        link, running = self.links[name], self.running
        place = link.chain, group
        key = self._key(name, x)
        kept = None if key is None else running.kept.get(key)
        if kept is not None:
            after = step(kept.state)
            running.now[place] = PassProgress(name, _detach(after), kept.one)  # without the graph of this recomputation
        else:
            before = self._begin(key) if link.before is None else self._go_on(name, link, place)
            after = step(before.state)
            self._keep(key, before, after)
            running.now[place] = PassProgress(name, after, before.one)
        if link.last:
            del running.now[place]
        return after

    def _begin(self, key: Key | None) -> SavedState:
        if key is None:
            return SavedState((), None)
        self.running.prune()
        return SavedState((), object())

    def _go_on(self, name: str, link: Link, place: tuple[int, int]) -> SavedState:
        now = self.running.now.get(place)
        if now is None or now.site != link.before:
            raise HostChanged(
                f"{name}: called without '{link.before}' before it, so its side network has no input state. Run the "
                "whole model, blocks in order. Gradient checkpointing must use use_reentrant=False.",
                where=name,
                expected=link.before,
            )
        return SavedState(now.state, now.one)

    def _keep(self, key: Key | None, before: SavedState, after: State) -> None:
        """Stores the block's input state if the block may be recomputed."""
        if key is None or not any(t.requires_grad for t in after):
            return
        self.running.kept[key] = SavedState(_detach(before.state), before.one)
        if not before.state:
            running, one = self.running, before.one
            next(t for t in after if t.grad_fn is not None).register_hook(lambda gradient: running.forget(one))

    @staticmethod
    def _key(name: str, x: Tensor) -> Key | None:
        """Identifies a pass through a block by the memory of its input; None if nothing is recomputed."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        return name, StorageWeakRef(x.untyped_storage()), int(x.storage_offset()), x.shape


def _detach(state: State) -> State:
    """The state without its graph."""
    return tuple(t.detach().requires_grad_(t.requires_grad) for t in state)
