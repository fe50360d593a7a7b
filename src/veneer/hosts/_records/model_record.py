"""The record of a family of models: its modules in the order of the forward pass, its inputs, and small models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from veneer.injection.sites import Site

from .._describe import SampleInputs, TowerPart
from .._diffusers import remaining
from .block_parts import Blocks, Single


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A family of models of one library.

    Args:
        classes: names of the library's classes. `library`: importable module that has them.
        modules: the model in the order of its forward pass: lists of blocks, single modules with parts, and paths of other
            modules or parameters.
        sample: keyword inputs of a forward pass, for a model.
        tiny: config of each small model by its name.
        roles: of layers and parameters outside of the blocks, by the last component of their path that is here; before
            `default_roles`.
        inert_biases: ends of paths of layers whose bias has no effect.
        read: ends of paths of layers whose tensors are read by another module, which does not call them.
        inert: ends of paths of parameters outside of the blocks that have no effect.
        full_size: name of a published model to its config and number of parameters.
    """

    default_roles: ClassVar[Mapping[str, str]] = {}
    classes: tuple[str, ...]
    library: str
    modules: tuple[str | Blocks | Single, ...]
    sample: Callable[[SampleInputs, Any], dict[str, Any]]
    tiny: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str] = field(default_factory=dict)
    inert_biases: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    full_size: Mapping[str, tuple[Mapping[str, Any], int]] = field(default_factory=dict)

    @property
    def top_package(self) -> str:
        """Top-level package of the library."""
        return self.library.partition(".")[0]

    def sites(self, part: TowerPart) -> Iterator[Site]:
        """Every site of a model, in the order of the forward pass."""
        order, lists = self.attention_order(part.model), self.lists(part)
        depth = 0
        for module in self.modules:
            if isinstance(module, str):
                yield from self._outside(part, module)
                continue
            here = part.at(stage=module.stage if len(lists) > 1 else None)
            if isinstance(module, Single):
                yield from module.sites(here, order)
                continue
            count = module.count(part)
            for i in range(count):
                yield from module.sites(here.at(depth=depth + i), i, i == count - 1, order)
            depth += count

    def lists(self, part: TowerPart) -> list[Blocks]:
        """The lists of blocks that a model has."""
        return [module for module in self.modules if isinstance(module, Blocks) and module.count(part)]

    def attention_order(self, model: nn.Module) -> Mapping[str, int]:
        """Index of each attention module with a processor by path; empty if the library has none."""
        return {}

    def _outside(self, part: TowerPart, path: str) -> Iterator[Site]:
        """Sites of a module or parameter outside of the blocks. `*` in a path stands for every child."""
        above, star, below = path.partition(".*")
        owner, _, name = path.rpartition(".")
        if star:
            for child in getattr(part.module(above), "_modules", ()):
                yield from self._outside(part, f"{above}.{child}{below}")
        elif part.has(owner, name):
            role = self.roles.get(name, self.default_roles.get(name, "other"))
            yield part.parameter(owner, name, role, inert=path.endswith(self.inert))
        else:
            yield from remaining(part, path, self.default_roles, self.roles, self.inert_biases, self.read, self.inert)

    def build(self, **config: Any) -> nn.Module:
        """A model with a config."""
        model: nn.Module = getattr(importlib.import_module(self.library), self.classes[0])(**config)
        return model.eval()
