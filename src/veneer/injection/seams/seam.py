"""Base classes of seams, which connect adapters to host modules.

`CallSeam` has hooks on modules that the host calls, `WeightSeam` parametrizes tensors that it reads, and `ProcessorSeam` wraps an
attention processor; `TokenSeam`, `VocabularySeam` and `ResidualSeam` have hooks on two modules; `KeyValueSeam` and
`KeyChoiceSeam` enter a torch function mode while an attention module runs. No module is replaced and no
`forward` patched. Hooks are bound methods of the seam, and the seam is a child of the host module, so that copies, moves and
casts of the host include the adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedSite
from ..method import Adapter
from .adapter_calls import is_tracing, module_at


def _ignore_missing(seam: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith(seam.__dict__["_prefix"])]


class Seam(nn.Module, ABC):
    """Holds the adapters of one attachment at one host module, and hides them from the host's `state_dict`.

    Args:
        tower: root module of the host.
        parts: sites and their adapters, all of one module or tensor, with disjoint rows.

    Attributes:
        idle: True while the strength is 0.
    """

    adapters: Sequence[Any]
    sites: list[Any]
    idle: bool

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__()
        if len(parts) > 1:
            parts = sorted(parts, key=lambda part: getattr(part[0], "rows", None) or (0, 0))
        self.add_module("adapters", nn.ModuleList(adapter for _, adapter in parts))
        # bypasses nn.Module.__setattr__, which is ten times slower and would register the tower as a child
        self.__dict__.update(tower=tower, _prefix="", _handles=[], joined=False, sites=[site for site, _ in parts], idle=False)
        self.register_load_state_dict_post_hook(_ignore_missing)

    @abstractmethod
    def join(self, name: str) -> None:
        """Installs the seam on the host module. `name`: of the attachment."""

    @abstractmethod
    def uninstall(self) -> None:
        """Undoes `join`, bitwise."""

    @abstractmethod
    def is_intact(self) -> bool:
        """True if the host still has this seam where `join` installed it."""

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength that the adapters do not support."""

    def write_strength(self, strength: float) -> None:
        """Writes the strength into the adapters' buffers."""
        for adapter in self.adapters:
            adapter.get_buffer("strength").fill_(strength)
        self.idle = strength == 0

    def is_disabled(self) -> bool:
        """True if the strength is 0 outside of tracing. Traced graphs always include the adapters."""
        return not torch.compiler.is_compiling() and self.idle and not is_tracing()

    def is_bypassed(self) -> bool:
        """True if this seam does nothing in the current forward pass: it is disabled, or another seam applies its adapters."""
        return self.is_disabled()

    def module(self, path: str) -> nn.Module:
        """The host module at `path`."""
        return module_at(self.__dict__["tower"], path)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Empty: adapters are saved by their attachment, and base checkpoints keep their keys."""
        return OrderedDict() if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.__dict__["_prefix"] = prefix


class HookSeam(Seam):
    """A seam that is a child of one host module and acts through hooks."""

    home: str = ""

    def join(self, name: str) -> None:
        owner = self.owner()
        if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise UnsupportedSite(
                f"{self.sites[0].name}: '{self.home}' is a {type(owner).__name__}, which would treat the adapter as one of its "
                "layers. Select a module inside it.",
                site=self.sites[0].name,
                given=type(owner).__name__,
            )
        names = (f"veneer_{name}" + (f"_{i}" if i else "") for i in range(len(owner._modules) + 1))
        child = next(n for n in names if n not in owner._modules)
        owner.add_module(child, self.train(owner.training))
        self.__dict__.update(_owner=owner, _child=child, joined=True)
        self.__dict__["_handles"] = list(self.hooks())

    def owner(self) -> nn.Module:
        """The host module whose child this seam is."""
        return self.module(self.home)

    @abstractmethod
    def hooks(self) -> Sequence[RemovableHandle]:
        """Registers the hooks."""

    def uninstall(self) -> None:
        for handle in self.__dict__["_handles"]:
            handle.remove()
        if self.__dict__["joined"]:
            del self.__dict__["_owner"]._modules[self.__dict__["_child"]]
        self.__dict__.update(_handles=[], joined=False)

    def is_in_place(self) -> bool:
        """True if the module on which `join` installed the seam still has it as a child."""
        return self.__dict__["joined"] and self.__dict__["_owner"]._modules.get(self.__dict__["_child"]) is self

    def is_intact(self) -> bool:
        try:
            return getattr(self.module(self.home), self.__dict__["_child"], None) is self
        except AttributeError:
            return False
