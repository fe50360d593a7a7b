"""State of a tower while something is attached: its attachments, and its values from before. Stored in the tower's `__dict__`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import HostChanged
from ..sharded_tensor import sharded_modules, unsharded_class
from .protocol import AttachmentProtocol

_KEY = "_veneer_model_state"


class MergeRecord(NamedTuple):
    """An attachment that is merged into the weights, and the strength that it was merged at."""

    attachment: AttachmentProtocol
    scale: float

    @property
    def name(self) -> str:
        """The attachment's name."""
        return self.attachment.name


class ModelState:
    """The attachments of one tower, in order; its `requires_grad` flags and norm statistics from before the first.

    Attributes:
        merged: attachments that are merged into the weights, in the order of merging.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.attachments: list[AttachmentProtocol] = []
        self.merged: list[MergeRecord] = []
        modules = list(tower.named_modules())
        named = ((f"{path}.{key}" if path else key, p) for path, m in modules for key, p in m._parameters.items())
        self.requires_grad = {name: p.requires_grad for name, p in named if p is not None}
        self.statistics = {name: b.detach().clone() for name, b in statistics(modules)}

    def restore(self, tower: nn.Module) -> None:
        """Restores flags and statistics after the last detach."""
        for name, p in tower.named_parameters():
            p.requires_grad_(self.requires_grad.get(name, p.requires_grad))
        with torch.no_grad():
            for name, buffer in statistics(tower.named_modules()):
                if name in self.statistics:
                    buffer.copy_(self.statistics[name])


def statistics(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """Buffers of named modules that a forward pass in training mode changes: norm statistics."""
    norms = [(n, m) for n, m in modules if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    return [(f"{n}.{k}" if n else k, b) for n, m in norms for k, b in m.named_buffers(recurse=False)]


def changed_statistics(tower: nn.Module) -> dict[str, Tensor]:
    """Norm statistics that differ from those at the first attach."""
    state = find_model_state(tower)
    before = state.statistics if state else {}
    current = statistics(tower.named_modules())
    return {name: b.detach() for name, b in current if name in before and not (b.is_meta or torch.equal(b, before[name]))}


def find_model_state(tower: nn.Module) -> ModelState | None:
    """The tower's state; None if nothing is attached."""
    state: ModelState | None = tower.__dict__.get(_KEY)
    return state


def ensure_model_state(tower: nn.Module) -> ModelState:
    """The tower's state; created from its present values if nothing is attached."""
    if find_model_state(tower) is None:
        tower.__dict__[_KEY] = ModelState(tower)
    state: ModelState = tower.__dict__[_KEY]
    return state


def drop_unused_model_state(tower: nn.Module) -> None:
    """Restores the tower and deletes its state, if nothing is attached."""
    state = find_model_state(tower)
    if state is not None and not state.attachments:
        state.restore(tower)
        del tower.__dict__[_KEY]


def refuse_compiled(tower: nn.Module, what: str, wrapped: bool = False) -> None:
    """Raises if hooks added now would be silently dropped. `wrapped`: the caller passed the wrapper of `torch.compile`.

    Raises:
        HostChanged: the tower or one of its modules is compiled or sharded.
    """
    sharded = sharded_modules(tower)
    for name, module in tower.named_modules():
        compiled = wrapped or type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None
        if compiled or module in sharded:
            how = "torch.compile" if compiled else "sharding"
            lost = "drops hooks added later" if compiled else "leaves each process a part of every weight"
            where = name or unsharded_class(type(tower)).__name__
            raise HostChanged(
                f"{what}: '{where}' has been through {how}, which {lost}. "
                f"Attach first, then {'compile' if compiled else 'shard'}.",
                where=where,
                given=how,
                expected="attach first",
            )


def reject_sharded(towers: Iterable[nn.Module], what: str, do: str) -> None:
    """Raises if a tower is sharded, for an operation that reads or replaces whole weights.

    Args:
        what: name of the operation. `do`: what to do in its place.
    Raises:
        HostChanged: names the first sharded module.
    """
    for tower in towers:
        sharded = sharded_modules(tower)
        names = [name or unsharded_class(type(tower)).__name__ for name, module in tower.named_modules() if module in sharded]
        if names:
            where = names[0]
            message = f"{what}: '{where}' is sharded, so that this process holds a part of its weights. {do}"
            raise HostChanged(message, where=where, given="sharding", expected=f"{what} before sharding")


def lookup(root: Any, path: str) -> Any:
    """The value at a dotted attribute path."""
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root
