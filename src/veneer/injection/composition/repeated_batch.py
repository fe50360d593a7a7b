"""Repeats the batch of a tower for adapters that run in parallel, at its input or at the first block with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attachment.attachment import Attachment
from ..errors import HostChanged, OptionError
from ..seams.adapter_calls import module_at
from ..sites import Site, StreamSite
from ..towers import towers_of
from .nodes import Parallel


class RepeatedBatch:
    """A pre-hook that repeats the rows of a module's arguments.

    Args:
        node: with one copy of the batch for each child. `attached`: the attachments below it, all on one tower.
    """

    def __init__(self, node: Parallel, attached: Sequence[Attachment]) -> None:
        towers = {id(tower): tower for a in attached for tower in a.towers.values()}
        if len(towers) != 1:
            raise OptionError.of("parallel", "children", node.names, f"attachments on one model, not on {len(towers)}")
        (tower,) = towers.values()
        self.copies, self.whole = len(node.children), not node.shared_layers
        self.path = "" if self.whole else _first_block(tower, node, [site for a in attached for site, _ in a.parts.values()])
        self.module: nn.Module = module_at(tower, self.path)
        self._handle: Any = None

    def start(self) -> None:
        """Registers the hook."""
        self._handle = self.module.register_forward_pre_hook(self._repeat, with_kwargs=True, prepend=True)

    def stop(self) -> None:
        """Removes the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _repeat(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        values = pytree.tree_leaves((args, kwargs))
        rows = next(len(v) for v in values if isinstance(v, Tensor) and v.ndim > 1)
        several = [v for v in values if isinstance(v, Tensor) and v.ndim > 1 and len(v) == rows]
        if not self.whole and len(several) > 1:
            message = (
                f"parallel: the block '{self.path}' reads {len(several)} tensors of the batch, so the layers before it cannot be "
                "shared. Set shared_layers=False."
            )
            raise HostChanged(message, where=self.path, given=len(several), expected=1)

        def repeated(value: Any) -> Any:
            is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return torch.cat([value] * self.copies) if is_batch else value

        both: tuple[Any, Any] = pytree.tree_map(repeated, (args, kwargs))
        return both


def _first_block(tower: nn.Module, node: Parallel, sites: Sequence[Site]) -> str:
    """Path of the first block with an adapter.

    Raises:
        OptionError: an adapter is outside the blocks, or the host has no stream of blocks.
    """
    outside = next((site.name for site in sites if site.depth is None), None)
    depth = min((site.depth for site in sites if site.depth is not None), default=None)
    streams = [s for t in towers_of(tower) for s in t.sites if isinstance(s, StreamSite) and s.depth == depth and not s.stage]
    blocks = [s for s in streams if s.role == "block"]
    if outside is not None or len(blocks) != 1:
        given = outside or f"{len(blocks)} blocks of depth {depth}"
        message = f"parallel: shared_layers needs adapters inside a row of blocks; {given}. Set shared_layers=False."
        raise OptionError(message, option="shared_layers", method="parallel", where=outside, given=given, expected="blocks")
    return blocks[0].path
