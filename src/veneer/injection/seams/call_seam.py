"""Seams: how adapters join a host module. The only code that touches one.

`CallSeam` for sites that the host calls (hooks), `WeightSeam` (in `parametrized.py`) for tensors that it reads,
`ProcessorSeam` (in `processors.py`) for attention whose inputs change. `TokenSeam` and `VocabularySeam` (in `sequences.py`)
are call seams with two places to act. No module is replaced, no `forward` patched; hooks are bound methods of the seam, which
is a child of the host module, so that copies, moves and casts of the host take the adapters along.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from ..composition.batch_routing import Place
from ..errors import HostChanged, UnsupportedSite
from ..method import Adapter
from ..sites import Port, Site
from .adapter_calls import blend, by_rows, cast, first, main_output, module_at, recorded

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # that make their output anew, and do not keep it


def _forget_missing(seam: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith(seam.__dict__["_prefix"])]


class Seam(nn.Module, ABC):
    """Holds the adapters of one attachment at one host module, and hides them from the host's `state_dict`.

    Args:
        tower: root module of the host.
        parts: sites and their adapters; all at one place, with disjoint rows.

    Attributes:
        idle: True while the strength is 0.
    """

    sites: list[Any]
    idle: bool

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__()
        if len(parts) > 1:
            parts = sorted(parts, key=lambda part: getattr(part[0], "rows", None) or (0, 0))
        self.adapters = nn.ModuleList(adapter for _, adapter in parts)
        # written past torch's own way, which takes ten times as long and would make the tower a child
        self.__dict__.update(tower=tower, _prefix="", _handles=[], joined=False, sites=[site for site, _ in parts], idle=False)
        self.register_load_state_dict_post_hook(_forget_missing)

    @abstractmethod
    def join(self, name: str) -> None:
        """Install at the host module, under the attachment's name."""

    @abstractmethod
    def part(self) -> None:
        """Undo `join`, bitwise."""

    @abstractmethod
    def intact(self) -> bool:
        """True if the host still holds this seam where it was joined."""

    def check_strength(self, strength: float) -> None:
        """Raise `StateError` for a strength that the adapters cannot have."""

    def write_strength(self, strength: float) -> None:
        """Fill the adapters' buffers."""
        for adapter in self.adapters:
            adapter.get_buffer("strength").fill_(strength)
        self.idle = strength == 0

    def asleep(self) -> bool:
        """True where the adapters need not run: at strength 0 they change nothing. What is recorded, to run again, has them."""
        return not torch.compiler.is_compiling() and self.idle and not recorded()

    def passes(self) -> bool:
        """True where this seam leaves everything as it is: its adapters sleep, or another one acts for it."""
        return self.asleep()

    def module(self, path: str) -> nn.Module:
        """The host module at `path`."""
        return module_at(self.__dict__["tower"], path)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing: adapters are saved by their attachment, and base checkpoints keep their keys."""
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
                f"{self.sites[0].name}: '{self.home}' is a container, which would run or list the adapter as its own.",
                site=self.sites[0].name,
                given=type(owner).__name__,
            )
        names = (f"veneer_{name}" + (f"_{i}" if i else "") for i in range(len(owner._modules) + 1))
        child = next(n for n in names if n not in owner._modules)
        owner.add_module(child, self.train(owner.training))
        self.__dict__.update(_owner=owner, _child=child, joined=True)
        self.__dict__["_handles"] = list(self.hooks())

    def owner(self) -> nn.Module:
        """The host module that it is a child of."""
        return self.module(self.home)

    @abstractmethod
    def hooks(self) -> Sequence[RemovableHandle]:
        """Register the hooks."""

    def part(self) -> None:
        for handle in self.__dict__["_handles"]:
            handle.remove()
        if self.__dict__["joined"]:
            del self.__dict__["_owner"]._modules[self.__dict__["_child"]]
        self.__dict__.update(_handles=[], joined=False)

    def in_place(self) -> bool:
        """True if the module that it was joined to still holds it."""
        return self.__dict__["joined"] and self.__dict__["_owner"]._modules.get(self.__dict__["_child"]) is self

    def intact(self) -> bool:
        try:
            return getattr(self.module(self.home), self.__dict__["_child"], None) is self
        except AttributeError:
            return False


class CallSeam(HookSeam):
    """Hooks on modules that the host calls: one read port, one write port.

    The read port's tensor is taken from the call itself where both ports are of one module, else a hook keeps it until
    the write port's hook has used it.

    Attributes:
        place: its place in a mixed batch, while samples of a batch differ.
        behind: of the seams that change what the module reads, those that were joined before.
        above: weights of this module that later attachments change, in order. While one of them needs this seam's change in the
            weights first, this seam does nothing in the call.

    Of several that act on one layer, the later joined change what the earlier ones made of it: y = W x + b, changed in turn.
    So the later joined change x first, and each reads x as it was before the changes of those joined earlier.
    """

    read: Port
    write: Port
    dim: int
    place: Place | None
    behind: int
    above: Sequence[Any] = ()
    _x: Tensor | None

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Site, Adapter]], read: Port, write: Port, dim: int = -1) -> None:
        super().__init__(tower, parts)
        self.__dict__.update(read=read, write=write, dim=dim, home=write.path, _x=None, place=None, behind=0)

    def hooks(self) -> list[RemovableHandle]:
        reader, writer = self.module(self.read.path), self.module(self.write.path)
        self.behind = self._changed_inputs(writer)
        handles = []
        if not self._direct:
            keep = self._keep_input if self.read.side == "in" else self._keep_output
            handles.append(self._register(reader, self.read.side, keep, self.behind > 0))
        write = self._write_output if self.write.side == "out" else self._write_input
        return [*handles, self._register(writer, self.write.side, write, self.inward)]

    @property
    def inward(self) -> bool:
        """True where a layer's x is changed, in the place of its y."""
        return self.write.side == "in" and hasattr(self.adapters[0], "input")

    def _changed_inputs(self, module: nn.Module) -> int:
        """How many seams there are before this one that change the x of the layer that it acts on."""
        if self.inward or self.read.path != self.write.path or self.read.side == self.write.side:
            return 0
        return sum(isinstance(s, CallSeam) and s.inward for s in itertools.takewhile(lambda s: s is not self, module.children()))

    @property
    def _direct(self) -> bool:
        return self.read.path == self.write.path and not self.behind

    @staticmethod
    def _register(module: nn.Module, side: str, hook: Any, first: bool = False) -> RemovableHandle:
        """`first`: before the hooks that are there."""
        if side == "in":
            return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        return module.register_forward_hook(hook, with_kwargs=True)

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._x = None if self.passes() else first(args, kwargs)

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._x = None if self.passes() else main_output(output)

    def _write_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.passes():
            return None
        y = main_output(output)
        x = self._take() if not self._direct else first(args, kwargs) if self.read.side == "in" else y
        after = self.adapt(x, y, x is not y and self._fresh(module))
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _write_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.passes():
            return None
        y = first(args, kwargs)
        after = self.adapt(y if self._direct else self._take(), y)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): after})

    def _take(self) -> Tensor:
        x, self._x = self._x, None
        if x is None:
            raise HostChanged(
                f"{self.sites[0].name}: '{self.write.path}' ran before '{self.read.path}' was read. Detach and attach again.",
                where=self.sites[0].name,
                given=self.write.path,
                expected=self.read.path,
            )
        return x

    @property
    def whole(self) -> bool:
        """True for one site that is no slice."""
        return len(self.sites) == 1 and getattr(self.sites[0], "rows", None) is None

    def passes(self) -> bool:
        if self.place is not None:
            return self.place.leader is not self
        return self.asleep() or (self.above != () and self.in_weights())

    def in_weights(self) -> bool:
        """True while its adapters act in the weights, because a later attachment changes these in another way than by a sum."""
        return any(beneath.takes(self) for beneath in self.above)

    def _fresh(self, module: nn.Module) -> bool:
        """True where nobody else can have kept what the module gave: a layer of torch's own whose first hook is this seam's."""
        sliced = getattr(self.sites[0], "rows", None) is not None
        if torch.compiler.is_compiling() or sliced or type(module) not in LAYERS or torch_modules._global_forward_hooks:
            return False
        return next(iter(module._forward_hooks.values())) == self._write_output

    def adapt(self, x: Tensor, y: Tensor, fresh: bool = False) -> Tensor:
        """The adapters' output; in a mixed batch that of every attachment, on its own rows."""
        return self.slices(x, y, fresh) if self.place is None else self.place.run(x, y, fresh)

    def slices(self, x: Tensor, y: Tensor, fresh: bool = False) -> Tensor:
        """The adapters' output, slice by slice where sites have rows. `fresh`: y may be written over."""
        return by_rows(self.sites, self.adapters, y, self.dim, lambda a, part: self._one(a, x, part, fresh))

    @staticmethod
    def _one(adapter: Any, x: Tensor, y: Tensor, fresh: bool) -> Tensor:
        before = y if adapter.blends else cast(y, adapter)
        if hasattr(adapter, "input"):
            return blend(adapter, adapter.input, before).to(y.dtype)
        form = adapter.output_ if fresh and hasattr(adapter, "output_") else adapter.output
        return blend(adapter, form, before, cast(x, adapter) if adapter.casts else x).to(y.dtype)
