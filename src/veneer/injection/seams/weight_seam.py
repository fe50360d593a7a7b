"""The seam of tensors that the host reads: a parametrization."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapter_forms import WeightAdapter
from ..errors import UnsupportedSite
from ..method import Adapter
from ..sites import ParamSite
from .adapter_calls import apply_by_rows, base_tensor, blend, cast
from .call_seam import LayerOrder
from .seam import Seam


def changeable(tensor: Tensor) -> bool:
    """True for a floating-point tensor that is not quantized."""
    return tensor.is_floating_point() and type(tensor.data) in (Tensor, nn.Parameter)


class WeightSeam(Seam):
    """A parametrization of a tensor that the host reads. Moves the key; `Attachment.host_state_dict` moves it back.

    Attributes:
        layer_order: call seams of earlier attachments on the same module, which may have to act first, or None.
    """

    layer_order: LayerOrder | None = None

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.path, self.param = parts[0][0].path, parts[0][0].param
        self._refuse_quantized()

    def _refuse_quantized(self, why: str = "is read, not called") -> None:
        tensor = getattr(self.module(self.path), self.param)
        if not changeable(tensor):
            raise UnsupportedSite(
                f"{self.sites[0].name}: a {type(tensor.data).__name__} of {tensor.dtype} is quantized and {why}, so "
                "its change cannot be applied. Select called sites only, or load the base model without quantization.",
                site=self.sites[0].name,
                given=tensor.dtype,
            )

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        if self.is_bypassed():
            return weight
        return self.own(weight if self.layer_order is None else self.layer_order.apply(self.param, weight))

    def own(self, weight: Tensor) -> Tensor:
        """The change of this seam's adapters, slice by slice."""
        return apply_by_rows(self.sites, self.adapters, weight, 0, self.change)

    @staticmethod
    def change(adapter: WeightAdapter, part: Tensor) -> Tensor:
        """One adapter's weight form at its strength."""
        return blend(adapter, adapter.weight, part if adapter.blends else cast(part, adapter)).to(part.dtype)

    def join(self, name: str) -> None:
        target = self.module(self.path)
        target.__dict__.setdefault("_veneer_order", list(target._parameters))
        _own_class(target)
        parametrize.register_parametrization(target, self.param, self.train(target.training), unsafe=True)
        _claim(target)
        self.__dict__.update(_target=target, joined=True)

    def uninstall(self) -> None:
        if not self.__dict__["joined"]:
            return
        target = self.__dict__["_target"]
        chain: Any = target.parametrizations[self.param]
        keep = [m for m in chain if m is not self]
        if keep:
            for index in range(len(chain)):
                del chain._modules[str(index)]
            for index, module in enumerate(keep):
                chain._modules[str(index)] = module
        else:
            self._restore(target)
        self.__dict__["joined"] = False

    def _restore(self, target: nn.Module) -> None:
        original: Any = base_tensor(target, "", self.param)
        _own_class(target)
        parametrize.remove_parametrizations(target, self.param, leave_parametrized=False)
        target._parameters[self.param] = original
        for key in target.__dict__["_veneer_order"]:
            if key in target._parameters:
                target._parameters[key] = target._parameters.pop(key)
        if not parametrize.is_parametrized(target):
            del target.__dict__["_veneer_order"]

    def is_intact(self) -> bool:
        try:
            target = self.module(self.path)
        except AttributeError:
            return False
        lists: Any = getattr(target, "parametrizations", {})
        return any(m is self for m in lists[self.param]) if self.param in lists else False


class Carrier(WeightSeam):
    """A parametrization without adapters, for earlier call seams that change this tensor together with the weight."""

    def __init__(self, tower: nn.Module, site: ParamSite) -> None:
        Seam.__init__(self, tower, ())
        self.path, self.param = site.path, site.param
        self.__dict__["sites"] = [site]
        self._refuse_quantized("holds the change of an adapter that is attached already")

    def own(self, weight: Tensor) -> Tensor:
        """The tensor, unchanged."""
        return weight


def _own_class(module: nn.Module) -> None:
    """Gives a parametrized module its own class: copies share the class that torch makes, and registering changes it."""
    if parametrize.is_parametrized(module) and not _owns(module):
        cls = type(module)
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, own)
        _claim(module)


def _owns(module: nn.Module) -> bool:
    owner = vars(type(module)).get("_veneer_owner")
    return owner is not None and owner() is module


def _claim(module: nn.Module) -> None:
    type(module)._veneer_owner = weakref.ref(module)  # type: ignore[attr-defined]
