"""State that goes from block to block beside the stream, within one pass of the model."""

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
    """A block's place: number of its chain, index in it, the site before it, and how many blocks the chain has."""

    chain: int
    index: int
    before: str | None
    length: int

    @property
    def last(self) -> bool:
        """True for the block that the chain ends with."""
        return self.index == self.length - 1


class Now(NamedTuple):
    """How far a pass is: the site that was last, the state after it, and the pass itself, where it may be run again."""

    site: str
    state: State
    one: object


class Kept(NamedTuple):
    """The state from before a block in one pass."""

    state: State
    one: object


class Running:
    """What passes have on their way. A copy begins with nothing, as a fresh one."""

    def __init__(self) -> None:
        self.now: dict[tuple[int, int], Now] = {}
        self.kept: dict[Key, Kept] = {}

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()

    def prune(self) -> None:
        """Forget passes whose features nobody has any more."""
        for key in [key for key in self.kept if key[1].expired()]:
            del self.kept[key]

    def forget(self, one: object) -> None:
        """Forget a pass whose gradients are done. What it began with is nothing, and stays known as its."""
        for key in [key for key, kept in self.kept.items() if kept.one is one and kept.state]:
            del self.kept[key]


class Chain(nn.Module):
    """The blocks of a tower in their order, and the state on its way through them.

    A new chain begins where stage, width or layout change; state does not pass from one to the next.

    A block may be run again in the backward pass (gradient checkpointing), last block first and also after another pass of the
    model. It is known by its input, which is the same memory, and gets the state from before it in that very pass.
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
        self.running = Running()

    def carry(self, name: str, x: Tensor, step: Callable[[State], State], group: int = 0) -> State:
        """The state after a block.

        Args:
            name: of the site. `x`: the block's input, as the host has it, uncast.
            step: from the state before the block, empty for the first, to that after it.
            group: which part of a mixed batch runs.
        Raises:
            HostChanged: the block before did not run before it in this pass.
        """
        link, running = self.links[name], self.running
        place = link.chain, group
        key = self._key(name, x)
        kept = None if key is None else running.kept.get(key)
        if kept is not None:
            after = step(kept.state)
            running.now[place] = Now(name, _values(after), kept.one)  # no graph: this one is thrown away
        else:
            before = self._begin(key) if link.before is None else self._go_on(name, link, place)
            after = step(before.state)
            self._keep(key, before, after)
            running.now[place] = Now(name, after, before.one)
        if link.last:
            del running.now[place]
        return after

    def _begin(self, key: Key | None) -> Kept:
        if key is None:
            return Kept((), None)
        self.running.prune()
        return Kept((), object())

    def _go_on(self, name: str, link: Link, place: tuple[int, int]) -> Kept:
        now = self.running.now.get(place)
        if now is None or now.site != link.before:
            raise HostChanged(
                f"{name}: it ran, and '{link.before}' before it did not: its side network has nothing to go on from. Run the "
                "whole model, blocks in their order. Gradient checkpointing must be that with use_reentrant=False.",
                where=name,
                expected=link.before,
            )
        return Kept(now.state, now.one)

    def _keep(self, key: Key | None, before: Kept, after: State) -> None:
        """Note what the block was given, where it may be run again."""
        if key is None or not any(t.requires_grad for t in after):
            return
        self.running.kept[key] = Kept(_values(before.state), before.one)
        if not before.state:
            running, one = self.running, before.one
            next(t for t in after if t.grad_fn is not None).register_hook(lambda gradient: running.forget(one))

    @staticmethod
    def _key(name: str, x: Tensor) -> Key | None:
        """Tells the passes of a block apart by the memory of its input; None where nothing is run again."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        return name, StorageWeakRef(x.untyped_storage()), int(x.storage_offset()), x.shape


def _values(state: State) -> State:
    """The same without its graph."""
    return tuple(t.detach().requires_grad_(t.requires_grad) for t in state)
