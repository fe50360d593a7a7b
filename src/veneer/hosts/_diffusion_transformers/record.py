"""The record of a family of diffusion transformers: its modules in the order of the forward pass, and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from veneer.injection.sites import BranchSite, Site

from .._describe import SampleInputs, TowerPart
from .._diffusers import processor_order, remaining
from .parts import Part

ROLES = {
    "pos_embed": "embed.patch", "patch_embed": "embed.patch", "x_embedder": "embed.patch", "context_embedder": "embed.context",
    "caption_projection": "embed.context", "linear": "adaln", "proj_out": "proj.out", "proj_out_1": "adaln",
    "proj_out_2": "proj.out",
}  # fmt: skip
"""Roles of layers outside of the blocks, by the last component of their path that is here."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks.

    Args:
        path: of the list.
        parts: of each block, in the order of the forward pass; a block lacks those whose module it does not have.
        stage: label of the sites, if the model has blocks in several lists.
        last_inert: beginnings of the names of sites in the last block whose effect the model drops, such as its text stream.
    """

    path: str
    parts: tuple[Part, ...]
    stage: str | None = None
    last_inert: tuple[str, ...] = ()

    def sites(self, part: TowerPart, index: int, last: bool, order: dict[str, int]) -> Iterator[Site]:
        """Every site of one block."""
        block = f"{self.path}.{index}"
        unused = tuple(f"{block}.{name}" for name in self.last_inert) if last else ()
        for site in (site for piece in self.parts for site in piece.sites(part, block, order)):
            if not site.name.startswith(unused):
                yield site
            elif not isinstance(site, BranchSite):
                yield replace(site, inert=True)


@dataclass(frozen=True)
class TransformerRecord:
    """A family of diffusion transformers.

    Args:
        classes: names of the classes of diffusers.
        modules: the model in the order of its forward pass: lists of blocks, and paths of other modules or parameters.
        sample: keyword inputs of a forward pass, for a model.
        tiny: config of each small model by its name.
        roles: of layers and parameters outside of the blocks, by the last component of their path that is here; before `ROLES`.
        inert_biases: ends of paths of layers whose bias has no effect.
        read: ends of paths of layers whose tensors are read by another module, which does not call them.
        full_size: name of a published model to its config and number of parameters.
    """

    classes: tuple[str, ...]
    modules: tuple[str | Blocks, ...]
    sample: Callable[[SampleInputs, Any], dict[str, Any]]
    tiny: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str] = field(default_factory=dict)
    inert_biases: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    full_size: Mapping[str, tuple[Mapping[str, Any], int]] = field(default_factory=dict)

    def sites(self, part: TowerPart) -> Iterator[Site]:
        """Every site of a model, in the order of the forward pass."""
        order, lists = processor_order(part.model), [m for m in self.modules if isinstance(m, Blocks)]
        several = sum(bool(_length(part, blocks)) for blocks in lists) > 1
        depth = 0
        for module in self.modules:
            if isinstance(module, str):
                yield from self._outside(part, module)
                continue
            length = _length(part, module)
            for i in range(length):
                block = part.at(depth=depth + i, stage=module.stage if several else None)
                yield from module.sites(block, i, i == length - 1, order)
            depth += length

    def _outside(self, part: TowerPart, path: str) -> Iterator[Site]:
        """Sites of a module or parameter outside of the blocks. `*` in a path stands for every child."""
        above, star, below = path.partition(".*")
        owner, _, name = path.rpartition(".")
        if star:
            for child in getattr(part.module(above), "_modules", ()):
                yield from self._outside(part, f"{above}.{child}{below}")
        elif part.has(owner, name):
            yield part.parameter(owner, name, self.roles.get(name, "adaln.table" if name == "scale_shift_table" else "other"))
        else:
            yield from remaining(part, path, ROLES, self.roles, self.inert_biases, self.read)

    def build(self, **config: Any) -> nn.Module:
        """A model with a config."""
        import diffusers

        model: nn.Module = getattr(diffusers, self.classes[0])(**config)
        return model.eval()


def _length(part: TowerPart, blocks: Blocks) -> int:
    """Number of blocks; 0 if the model has no such list."""
    module = part.module(blocks.path)
    return len(module) if isinstance(module, nn.ModuleList) else 0
