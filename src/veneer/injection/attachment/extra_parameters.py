"""Base parameters that an attachment trains beside its adapters, and their values from before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import HostChanged
from ..seams.adapter_calls import base_tensor, module_at


class Trained:
    """The parameters named in `train=`.

    Args:
        towers: component to module.
        places: saved name to (component, parameter path).

    Attributes:
        before: saved name to the base's own value: from before the first attachment that trains it.
    """

    def __init__(self, towers: Mapping[str, nn.Module], places: Mapping[str, tuple[str, str]]) -> None:
        self.towers, self.places = towers, places
        self.before: dict[str, Tensor] = {}
        self._owners: dict[str, nn.Module] = {}

    def parameter(self, component: str, path: str) -> nn.Parameter:
        """The parameter at a place."""
        owner, _, name = path.rpartition(".")
        value = base_tensor(self.towers[component], owner, name)
        assert isinstance(value, nn.Parameter)
        return value

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Saved name and parameter."""
        yield from ((key, self.parameter(*place)) for key, place in self.places.items())

    def start(self, others: Sequence[Trained]) -> None:
        """Let them require gradients, and keep their values; those that another attachment trains were kept by it."""
        kept = {id(p): other.before[key] for other in others for key, p in other._held()}
        for key, (component, path) in self.places.items():
            p = self.parameter(component, path)
            self._owners[key] = module_at(self.towers[component], path.rpartition(".")[0])
            self.before[key] = kept[id(p)] if id(p) in kept else p.detach().clone()
            p.requires_grad_(True)

    def stop(self, others: Sequence[Trained]) -> None:
        """Freeze them with their values from before, except those that another attachment trains still."""
        wanted = {id(p) for other in others for _, p in other._held()}
        with torch.no_grad():
            for key, p in self._held():
                if id(p) not in wanted:
                    p.copy_(self.before[key])
                    p.requires_grad_(False)
        self.before, self._owners = {}, {}

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """Those that were started, also where the host has dropped their module since."""
        for key, owner in self._owners.items():
            yield key, base_tensor(owner, "", self.places[key][1].rpartition(".")[2])

    def check(self) -> None:
        """Raise if the host has put another module in a trained one's place.

        Raises:
            HostChanged: naming it.
        """
        for key, owner in self._owners.items():
            component, path = self.places[key]
            if _at(self.towers[component], path.rpartition(".")[0]) is not owner:
                message = f"{key}: the host rebuilt a trained module after attach. Detach, change the host, then attach."
                raise HostChanged(message, where=key, given="rebuilt")


def _at(tower: nn.Module, path: str) -> nn.Module | None:
    try:
        return module_at(tower, path)
    except AttributeError:
        return None
