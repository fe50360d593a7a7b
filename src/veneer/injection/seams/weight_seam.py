"""Weight seams: parametrizations of tensors that the host reads without calling their module."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapter_forms import WeightAdapter
from ..errors import UnsupportedSite
from ..method import Adapter
from ..quantized_weight import is_ordinary
from ..sites import ParamSite
from .adapter_calls import apply_by_rows, base_tensor, blend, cast
from .call_seam import LayerOrder
from .seam import Seam


class WeightSeam(Seam):
    """A parametrization of a tensor. It renames the state-dict key, and `Attachment.host_state_dict` has the original one.

    Attributes:
        layer_order: earlier call seams on the same module, which may have to be applied before this seam, or None.
    """

    layer_order: LayerOrder | None = None

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[Any, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.path, self.param = parts[0][0].path, parts[0][0].param
        self._reject_quantized()

    def _reject_quantized(self, reason: str = "is read, not called") -> None:
        tensor = getattr(self.module(self.path), self.param)
        if not is_ordinary(tensor):
            raise UnsupportedSite(
                f"{self.sites[0].name}: a {type(tensor).__name__} of {tensor.dtype} is quantized and {reason}, so "
                "it cannot be parametrized. Select called sites only, or load the base model without quantization.",
                site=self.sites[0].name,
                given=tensor.dtype,
            )

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the changes of earlier call seams, if necessary, and of this seam."""
        if self.is_bypassed():
            return weight
        return self.apply_own(weight if self.layer_order is None else self.layer_order.apply(self.param, weight))

    def apply_own(self, weight: Tensor) -> Tensor:
        """The weight with the changes of this seam's adapters, slice by slice."""
        return apply_by_rows(self.sites, self.adapters, weight, 0, self.change)

    @staticmethod
    def change(adapter: WeightAdapter, part: Tensor) -> Tensor:
        """The weight form of one adapter, blended by its strength."""
        return blend(adapter, adapter.weight, part if adapter.applies_strength else cast(part, adapter)).to(part.dtype)

    def join(self, name: str) -> None:
        target = self.module(self.path)
        target.__dict__.setdefault("_veneer_order", list(target._parameters))
        _ensure_own_class(target)
        parametrize.register_parametrization(target, self.param, self.train(target.training), unsafe=True)
        _mark_owner(target)
        self.__dict__.update(_target=target, joined=True)

    def uninstall(self) -> None:
        if not self.__dict__["joined"]:
            return
        target = self.__dict__["_target"]
        chain: Any = target.parametrizations[self.param]
        others = [m for m in chain if m is not self]
        if others:
            for index in range(len(chain)):
                del chain._modules[str(index)]
            for index, module in enumerate(others):
                chain._modules[str(index)] = module
        else:
            self._restore(target)
        self.__dict__["joined"] = False

    def _restore(self, target: nn.Module) -> None:
        original: Any = base_tensor(target, "", self.param)
        _ensure_own_class(target)
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


class PassThroughSeam(WeightSeam):
    """A parametrization without adapters, which applies earlier call seams that change this tensor together with the weight."""

    def __init__(self, tower: nn.Module, site: ParamSite) -> None:
        Seam.__init__(self, tower, ())
        self.path, self.param = site.path, site.param
        self.__dict__["sites"] = [site]
        self._reject_quantized("must take the change of an earlier adapter")

    def apply_own(self, weight: Tensor) -> Tensor:
        """The tensor, unchanged."""
        return weight


def _ensure_own_class(module: nn.Module) -> None:
    """Copies the class of a parametrized module that is a copy: torch would change the class that both share."""
    if parametrize.is_parametrized(module) and not _has_own_class(module):
        cls = type(module)
        namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, namespace)
        _mark_owner(module)


def _has_own_class(module: nn.Module) -> bool:
    owner = vars(type(module)).get("_veneer_owner")
    return owner is not None and owner() is module


def _mark_owner(module: nn.Module) -> None:
    """Records that the class of the module belongs to this module alone."""
    type(module)._veneer_owner = weakref.ref(module)  # type: ignore[attr-defined]
