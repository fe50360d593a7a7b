"""What is attached to a model, and what the model was before. One ledger a tower, kept in the tower's `__dict__`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import HostChanged

if TYPE_CHECKING:
    from .attachment import Attachment

_KEY = "_veneer_ledger"


@dataclass(frozen=True)
class Merge:
    """One attachment that is in the weights, and the strength that it was merged at."""

    attachment: Attachment
    scale: float

    @property
    def name(self) -> str:
        """The attachment's name."""
        return self.attachment.name


class Ledger:
    """The attachments of one tower, in order; its `requires_grad` flags and norm statistics from before the first.

    Attributes:
        merged: what is in the weights, the first merged first.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.attachments: list[Attachment] = []
        self.merged: list[Merge] = []
        modules = list(tower.named_modules())
        named = ((f"{path}.{key}" if path else key, p) for path, m in modules for key, p in m._parameters.items())
        self.requires_grad = {name: p.requires_grad for name, p in named if p is not None}
        self.statistics = {name: b.detach().clone() for name, b in statistics(modules)}

    def restore(self, tower: nn.Module) -> None:
        """Put flags and statistics back, once nothing is attached."""
        for name, p in tower.named_parameters():
            p.requires_grad_(self.requires_grad.get(name, p.requires_grad))
        with torch.no_grad():
            for name, buffer in statistics(tower.named_modules()):
                if name in self.statistics:
                    buffer.copy_(self.statistics[name])


def statistics(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """The buffers that a forward pass in training mode changes, of named modules."""
    norms = [(n, m) for n, m in modules if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    return [(f"{n}.{k}" if n else k, b) for n, m in norms for k, b in m.named_buffers(recurse=False)]


def changed_statistics(tower: nn.Module) -> dict[str, Tensor]:
    """Norm statistics that differ from those at the first attach."""
    ledger = peek(tower)
    before = ledger.statistics if ledger else {}
    now = statistics(tower.named_modules())
    return {name: b.detach() for name, b in now if name in before and not (b.is_meta or torch.equal(b, before[name]))}


def peek(tower: nn.Module) -> Ledger | None:
    """The tower's ledger, if anything is attached."""
    found: Ledger | None = tower.__dict__.get(_KEY)
    return found


def open_ledger(tower: nn.Module) -> Ledger:
    """The tower's ledger; a new one if nothing is attached."""
    return tower.__dict__.setdefault(_KEY, Ledger(tower)) if peek(tower) is None else tower.__dict__[_KEY]


def close(tower: nn.Module) -> None:
    """Restore the tower and drop its ledger, if nothing is attached any more."""
    ledger = peek(tower)
    if ledger is not None and not ledger.attachments:
        ledger.restore(tower)
        del tower.__dict__[_KEY]


def refuse_compiled(tower: nn.Module, what: str, wrapped: bool = False) -> None:
    """Raise if hooks that are added now would be dropped without a word; `wrapped`: the tower was given compiled.

    Raises:
        HostChanged: the tower or a part of it is compiled or sharded.
    """
    sharded: dict[type, bool] = {}  # each class is looked at once
    for name, module in tower.named_modules():
        kind = type(module)
        if kind not in sharded:
            sharded[kind] = any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in kind.__mro__)
        compiled = wrapped or kind.__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None
        if compiled or sharded[kind]:
            how = "torch.compile" if compiled else "sharding"
            raise HostChanged(
                f"{what}: '{name or type(tower).__name__}' has been through {how} already, which drops hooks added later. "
                f"Attach first, then {'compile' if compiled else 'shard'}.",
                where=name or type(tower).__name__,
                given=how,
            )


def lookup(root: Any, path: str) -> Any:
    """The value at a dotted attribute path."""
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root
