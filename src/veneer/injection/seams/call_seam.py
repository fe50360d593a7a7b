"""Call seams: hooks on modules that the host calls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import InputAdapter
from ..errors import HostChanged, StateError
from ..method import Adapter
from ..sites import Port, Site
from .adapter_calls import Call, apply_by_rows, call_in_place, call_of, first_argument, main_output
from .seam import HookSeam, Seam

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # allocate their output and keep no reference to it


class BatchRoute(Protocol):
    """The call seams of several attachments at one place of the host, in a mixed batch; the first of them acts for all."""

    leader: CallSeam

    def run(self, x: Tensor, y: Tensor, overwrite: bool = False, /) -> Tensor:
        """y', each sample through its own adapters."""

    def share(self, seam: CallSeam, /) -> float:
        """Strength of one of the seams in the batch rows that run at present."""


class LayerOrder(Protocol):
    """Call seams on one layer, and the weight seams of a later attachment that change its tensors."""

    @property
    def weights(self) -> Mapping[str, Seam]:
        """Parameter name to the later attachment's seam."""

    def takes(self, call: CallSeam, /) -> bool:
        """True if a call seam acts in the weights at present."""

    def concerns(self, call: CallSeam, /) -> bool:
        """True if a call seam acts in the weights while everything is enabled."""

    def acting(self) -> Sequence[CallSeam]:
        """The call seams that act in the weights at present."""

    def apply(self, param: str, tensor: Tensor, /) -> Tensor:
        """The tensor with their changes."""


class CallSeam(HookSeam):
    """Hooks on modules that the host calls: one read port, one write port.

    The input is taken from the call itself if both ports belong to one module; else a hook stores it for the write port's hook.

    Which function applies the adapters is chosen by `choose_path`: when the seam joins the host, and when a mixed batch begins or
    ends. A single adapter without row slices is called directly, so that a stack trace reads: hook, `call_…`, adapter.

    Attributes:
        place: its place in a mixed batch, or None.
        direct: applies the only adapter, or None if there are row slices or a mixed batch.
        inputs_before: number of seams joined before that change the input of the module that this seam reads.
        layer_orders: changes of this module's weights by later attachments, in order. While one of them needs this seam's change
            in the weights first, this seam does nothing in the call.

    Of several seams on one layer, later ones change the output of earlier ones: y = W x + b, changed in turn. So the latest
    changes x first, and each reads x as it was before the changes of seams joined earlier.
    """

    read: Port
    write: Port
    dim: int
    place: BatchRoute | None
    direct: Call | None
    inputs_before: int
    layer_orders: Sequence[LayerOrder] = ()
    _calls: tuple[Call, ...]
    _may_overwrite: bool
    _x: Tensor | None

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Site, Adapter]], read: Port, write: Port, dim: int = -1) -> None:
        super().__init__(tower, parts)
        calls = tuple(call_of(adapter) for adapter in self.adapters)
        self.__dict__.update(read=read, write=write, dim=dim, home=write.path, _calls=calls, _x=None, inputs_before=0)
        self.choose_path(None)

    def choose_path(self, place: BatchRoute | None) -> None:
        """Selects how calls reach the adapters. `place`: in a mixed batch, or None."""
        direct = self._calls[0] if self.is_whole and place is None else None
        sliced = getattr(self.sites[0], "rows", None) is not None
        may_overwrite = not sliced and (place is not None or direct is call_in_place)
        self.__dict__.update(place=place, direct=direct, _may_overwrite=may_overwrite)

    def hooks(self) -> list[RemovableHandle]:
        reader, writer = self.module(self.read.path), self.module(self.write.path)
        self.inputs_before = self._changed_inputs(writer)
        handles = []
        if not self._reads_call:
            store = self._store_input if self.read.side == "in" else self._store_output
            handles.append(self._register(reader, self.read.side, store, self.inputs_before > 0))
        write = self._write_output if self.write.side == "out" else self._write_input
        return [*handles, self._register(writer, self.write.side, write, self.inward)]

    @property
    def inward(self) -> bool:
        """True if the adapters change the input of a layer instead of its output."""
        return self.write.side == "in" and isinstance(self.adapters[0], InputAdapter)

    def _changed_inputs(self, module: nn.Module) -> int:
        """Number of seams before this one that change the input of the layer that it acts on."""
        if self.inward or self.read.path != self.write.path or self.read.side == self.write.side:
            return 0
        return sum(isinstance(s, CallSeam) and s.inward for s in itertools.takewhile(lambda s: s is not self, module.children()))

    @property
    def _reads_call(self) -> bool:
        """True if x is an argument or the output of the call that the write port's hook sees."""
        return self.read.path == self.write.path and not self.inputs_before

    @staticmethod
    def _register(module: nn.Module, side: str, hook: Any, first: bool = False) -> RemovableHandle:
        """`first`: before the hooks that are registered already."""
        if side == "in":
            return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
        return module.register_forward_hook(hook, with_kwargs=True)

    def _store_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._x = None if self.is_bypassed() else first_argument(args, kwargs)

    def _store_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._x = None if self.is_bypassed() else main_output(output)

    def _write_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.is_bypassed():
            return None
        y = main_output(output)
        x = self._stored() if not self._reads_call else first_argument(args, kwargs) if self.read.side == "in" else y
        overwrite = x is not y and self._is_overwritable(module)
        after = self.apply_adapters(x, y, overwrite) if self.direct is None else self.direct(self.adapters[0], x, y, overwrite)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _write_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_bypassed():
            return None
        y = first_argument(args, kwargs)
        x = y if self._reads_call else self._stored()
        after = self.apply_adapters(x, y) if self.direct is None else self.direct(self.adapters[0], x, y, False)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): after})

    def _stored(self) -> Tensor:
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
    def is_whole(self) -> bool:
        """True for one site without row slices."""
        return len(self.sites) == 1 and getattr(self.sites[0], "rows", None) is None

    def is_bypassed(self) -> bool:
        if self.place is not None:
            return self.place.leader is not self
        return self.is_disabled() or (self.layer_orders != () and self.in_weights())

    def in_weights(self) -> bool:
        """True while its adapters act in the weights, because a later attachment changes these in another way than by a sum."""
        return any(order.takes(self) for order in self.layer_orders)

    def _is_overwritable(self, module: nn.Module) -> bool:
        """True if the output may be modified in place: a layer of torch whose first hook is this seam's."""
        if torch.compiler.is_compiling() or not self._may_overwrite:
            return False
        if type(module) not in LAYERS or torch_modules._global_forward_hooks:
            return False
        return next(iter(module._forward_hooks.values())) == self._write_output

    def apply_adapters(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y' of all adapters: in a mixed batch those of every attachment, each in its own batch rows."""
        return self.apply_slices(x, y, overwrite) if self.place is None else self.place.run(x, y, overwrite)

    def apply_slices(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y' of this seam's adapters, each in its own slice of y. `overwrite`: y may be modified in place."""
        pairs = list(zip(self._calls, self.adapters, strict=True))
        return apply_by_rows(self.sites, pairs, y, self.dim, lambda pair, part: pair[0](pair[1], x, part, overwrite))


class SwitchSeam(CallSeam):
    """For adapters whose output has another shape than the host's (`Adapter.changes_shape`), so that the strength is 0 or 1.

    A compiled graph has a guard on the strength here, no buffer.
    """

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: the adapter's output has another shape than the host's; strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def is_disabled(self) -> bool:
        """True at strength 0, also in a traced graph."""
        return self.idle
