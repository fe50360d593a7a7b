"""Base parameters that an attachment trains beside its adapters, and their original values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import HostChanged
from ..seams.adapter_calls import base_tensor, module_at


class ExtraParameters:
    """The parameters named in `train=`.

    Args:
        towers: component to module.
        paths: saved name to (component, parameter path).

    Attributes:
        original: saved name to the value from before the first attachment that trains it.
    """

    def __init__(self, towers: Mapping[str, nn.Module], paths: Mapping[str, tuple[str, str]]) -> None:
        self.towers, self.paths = towers, paths
        self.original: dict[str, Tensor] = {}
        self._owners: dict[str, nn.Module] = {}

    def parameter(self, component: str, path: str) -> nn.Parameter:
        """The parameter at a path."""
        owner, _, name = path.rpartition(".")
        value = base_tensor(self.towers[component], owner, name)
        assert isinstance(value, nn.Parameter)
        return value

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Saved name and parameter."""
        yield from ((key, self.parameter(*path)) for key, path in self.paths.items())

    def unfreeze(self, others: Sequence[ExtraParameters]) -> None:
        """Sets `requires_grad`, and stores the original values; of shared parameters, those that another attachment stored."""
        stored = {id(p): other.original[key] for other in others for key, p in other._unfrozen()}
        for key, (component, path) in self.paths.items():
            p = self.parameter(component, path)
            self._owners[key] = module_at(self.towers[component], path.rpartition(".")[0])
            self.original[key] = stored[id(p)] if id(p) in stored else p.detach().clone()
            p.requires_grad_(True)

    def restore(self, others: Sequence[ExtraParameters]) -> None:
        """Freezes the parameters and restores their original values, except those that another attachment still trains."""
        shared = {id(p) for other in others for _, p in other._unfrozen()}
        with torch.no_grad():
            for key, p in self._unfrozen():
                if id(p) not in shared:
                    p.copy_(self.original[key])
                    p.requires_grad_(False)
        self.original, self._owners = {}, {}

    def _unfrozen(self) -> Iterator[tuple[str, Tensor]]:
        """Unfrozen parameters, also of modules that the host has replaced since."""
        for key, owner in self._owners.items():
            yield key, base_tensor(owner, "", self.paths[key][1].rpartition(".")[2])

    def check(self) -> None:
        """Raises if the host has replaced a module with trained parameters.

        Raises:
            HostChanged: with the name of the parameter.
        """
        for key, owner in self._owners.items():
            component, path = self.paths[key]
            if _at(self.towers[component], path.rpartition(".")[0]) is not owner:
                message = f"{key}: the host rebuilt a trained module after attach. Detach, change the host, then attach."
                raise HostChanged(message, where=key, given="rebuilt")


def _at(tower: nn.Module, path: str) -> nn.Module | None:
    try:
        return module_at(tower, path)
    except AttributeError:
        return None
