"""Call seams: forward hooks on modules that the host calls."""

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
    """Call seams of several attachments at one port of the host in a mixed batch. `leader` applies the adapters of all."""

    leader: CallSeam

    def run(self, x: Tensor, y: Tensor, overwrite: bool = False, /) -> Tensor:
        """y', with the adapters of each sample applied to its rows."""

    def share(self, seam: CallSeam, /) -> float:
        """Strength of a seam in the batch rows that are currently processed."""


class LayerOrder(Protocol):
    """Order of the call seams on one layer and the weight seams of a later attachment that change its tensors."""

    @property
    def weights(self) -> Mapping[str, Seam]:
        """Parameter name to the later attachment's seam."""

    def applies(self, call: CallSeam, /) -> bool:
        """True if a call seam is currently applied in the weights."""

    def may_apply(self, call: CallSeam, /) -> bool:
        """True if a call seam is applied in the weights when everything is enabled."""

    def applied(self) -> Sequence[CallSeam]:
        """The call seams that are currently applied in the weights."""

    def apply(self, param: str, tensor: Tensor, /) -> Tensor:
        """The tensor with the changes of the call seams in `applied`."""


class CallSeam(HookSeam):
    """Hooks on modules that the host calls: x is taken from the read port, and the write port's tensor y is changed.

    If both ports belong to one module, a single hook sees x and y; otherwise another hook stores x.

    `choose_path` selects the function that applies the adapters, on attach and when a mixed batch begins or ends. A single
    adapter without row slices is called directly, so that a stack trace reads: hook, `call_…`, adapter.

    Attributes:
        place: the route of the current mixed batch, or None.
        direct: applies the only adapter; None with row slices and in a mixed batch.
        inputs_before: number of earlier seams that change the input of the module that this seam reads.
        layer_orders: later attachments that parametrize this module, in order. The hook does nothing while one of them has to
            apply this seam's adapters in the weights.

    Several seams on one layer compose in the order of attaching: y = W x + b is changed by one after the other. A later change
    of x therefore runs first, and each seam reads x without the changes of earlier seams.
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
        """Selects the function that applies the adapters. `place`: the route of a mixed batch, or None."""
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
        return [*handles, self._register(writer, self.write.side, write, self.changes_input)]

    @property
    def changes_input(self) -> bool:
        """True if the adapters change the input of a layer instead of its output."""
        return self.write.side == "in" and isinstance(self.adapters[0], InputAdapter)

    def _changed_inputs(self, module: nn.Module) -> int:
        """Number of earlier seams that change the input of the layer that this seam reads and writes."""
        if self.changes_input or self.read.path != self.write.path or self.read.side == self.write.side:
            return 0
        earlier = itertools.takewhile(lambda s: s is not self, module.children())
        return sum(isinstance(s, CallSeam) and s.changes_input for s in earlier)

    @property
    def _reads_call(self) -> bool:
        """True if the write port's hook sees x, as an argument or the output of the module."""
        return self.read.path == self.write.path and not self.inputs_before

    @staticmethod
    def _register(module: nn.Module, side: str, hook: Any, first: bool = False) -> RemovableHandle:
        """Registers a hook; if `first`, before the existing pre-hooks."""
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
        x = self._take_stored() if not self._reads_call else first_argument(args, kwargs) if self.read.side == "in" else y
        overwrite = x is not y and self._is_overwritable(module)
        after = self.apply_adapters(x, y, overwrite) if self.direct is None else self.direct(self.adapters[0], x, y, overwrite)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _write_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_bypassed():
            return None
        y = first_argument(args, kwargs)
        x = y if self._reads_call else self._take_stored()
        after = self.apply_adapters(x, y) if self.direct is None else self.direct(self.adapters[0], x, y, False)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): after})

    def _take_stored(self) -> Tensor:
        """The stored x, which is cleared.

        Raises:
            HostChanged: the write port's module ran before the read port's module.
        """
        x, self._x = self._x, None
        if x is None:
            raise HostChanged(
                f"{self.sites[0].name}: '{self.write.path}' ran before '{self.read.path}', whose tensor the adapter reads. "
                "Detach and attach again.",
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
        """True while the adapters are applied in the weights, because the order with a later attachment matters there."""
        return any(order.applies(self) for order in self.layer_orders)

    def _is_overwritable(self, module: nn.Module) -> bool:
        """True if the output may be modified in place: of a torch layer whose first forward hook is this seam's."""
        if torch.compiler.is_compiling() or not self._may_overwrite:
            return False
        if type(module) not in LAYERS or torch_modules._global_forward_hooks:
            return False
        return next(iter(module._forward_hooks.values())) == self._write_output

    def apply_adapters(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y' of all adapters; in a mixed batch those of all attachments, each in the batch rows of its samples."""
        return self.apply_slices(x, y, overwrite) if self.place is None else self.place.run(x, y, overwrite)

    def apply_slices(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y' of this seam's adapters, each in its slice of y. `overwrite`: y may be modified in place."""
        pairs = list(zip(self._calls, self.adapters, strict=True))
        return apply_by_rows(self.sites, pairs, y, self.dim, lambda pair, part: pair[0](pair[1], x, part, overwrite))


class SwitchSeam(CallSeam):
    """For adapters that change the shape of the output (`Adapter.changes_shape`): the strength must be 0 or 1.

    The strength is a Python value, so a change of it recompiles a compiled graph.
    """

    def check_strength(self, strength: float) -> None:
        """Raises `StateError` for a strength that is neither 0 nor 1."""
        if strength not in (0, 1):
            site = self.sites[0].name
            message = f"{site}: the adapter changes the shape of the output, so its strength must be 0 or 1, got {strength}."
            raise StateError(message, where=site, given=strength, expected=(0, 1))

    def is_disabled(self) -> bool:
        """True at strength 0, also in a traced graph."""
        return self.idle
