"""Effective weight and bias of an adapter: the host's tensors with the changes of earlier attachments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapter_forms import BiasAdapter, WeightAdapter
from ..errors import UnsupportedSite
from ..method import Adapter
from ..quantized_weight import float_weight, is_quantized
from ..sites import ParamSite
from .adapter_calls import apply_by_rows, base_tensor, blend, cast, module_at
from .call_seam import CallSeam
from .weight_seam import WeightSeam


def effective_tensor(adapter: nn.Module, module: nn.Module, param: str, rows: tuple[int, int] | None) -> Tensor | None:
    """W or b of the y = W x + b that `adapter.output(x, y)` receives.

    This is the host's tensor with the weight forms of adapters whose hooks run earlier. With it, a method that scales W x or
    divides by the norm of W computes the same in its output and weight forms, also with other attachments. Without other
    attachments it costs nothing.

    Args:
        module: the site's module, as found in `enter`. `rows`: of the site.
    Returns:
        These rows of the tensor; None if the module does not have the parameter.
    """
    tensor: Tensor | None = getattr(module, param, None)
    if tensor is None:
        return None
    if is_quantized(tensor):
        tensor = float_weight(module, param)
    for seam in module._modules.values():
        if isinstance(seam, CallSeam):
            if any(other is adapter for other in seam.adapters):
                break
            tensor = _apply_hook_change(seam, module, param, tensor)
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def effective_parametrized(adapter: nn.Module, module: nn.Module, param: str, rows: tuple[int, int] | None) -> Tensor:
    """The tensor that an adapter in a parametrization receives: the base tensor with the changes of the adapters before it."""
    tensor = base_tensor(module, "", param)
    for adapters, change in _parametrizations(module, param):
        if any(other is adapter for other in adapters):
            break
        tensor = change(tensor)
    return tensor if rows is None else tensor[slice(*rows)]


def _parametrizations(module: Any, param: str) -> Iterator[tuple[Iterable[nn.Module], Callable[[Tensor], Tensor]]]:
    """Yields the adapters and the function of each change of a tensor, in order."""
    for seam in module.parametrizations[param] if parametrize.is_parametrized(module, param) else ():
        if not isinstance(seam, WeightSeam):
            yield (), seam
        elif not seam.is_bypassed():
            for call in () if seam.layer_order is None else seam.layer_order.applied():
                if param in changed_tensors(call):
                    yield call.adapters, functools.partial(apply_change, call, module, param)
            yield seam.adapters, seam.apply_own


def changed_tensors(seam: CallSeam) -> set[str]:
    """Names of the module's tensors that the weight and bias forms of a call seam's adapters change."""
    site = seam.sites[0]
    owner, _, bias = site.bias.rpartition(".") if isinstance(seam.adapters[0], BiasAdapter) else ("", "", "")
    return {site.param, bias} if bias and owner == site.path else {site.param}


def _apply_hook_change(seam: CallSeam, module: nn.Module, param: str, tensor: Tensor) -> Tensor:
    """The tensor with the change of a seam's hook; unchanged if the seam is disabled, acts in the weights or on other tensors."""
    changes_bias, site = _changes_bias(seam, param), seam.sites[0]
    if seam.is_disabled() or seam.in_weights() or not (changes_bias or getattr(site, "param", None) == param):
        return tensor
    return apply_change(seam, module, param, tensor)


def apply_change(seam: CallSeam, module: nn.Module, param: str, tensor: Tensor) -> Tensor:
    """The tensor with the weight or bias forms of a call seam's adapters applied."""
    share = 1.0 if seam.place is None else seam.place.share(seam)
    if not share:
        return tensor
    change = functools.partial(_change_bias, seam, module) if _changes_bias(seam, param) else _change_weight
    changed = apply_by_rows(seam.sites, seam.adapters, tensor, 0, change)
    return changed if share == 1 else torch.lerp(tensor, changed, share)


def _changes_bias(seam: CallSeam, param: str) -> bool:
    """True if the parameter is the bias of a seam's layer, and the seam's adapters change it."""
    site = seam.sites[0]
    return isinstance(seam.adapters[0], BiasAdapter) and getattr(site, "bias", "") == f"{site.path}.{param}"


def _change_weight(adapter: Any, part: Tensor) -> Tensor:
    return WeightSeam.change(adapter, part) if isinstance(adapter, WeightAdapter) else part


def _change_bias(seam: CallSeam, module: nn.Module, adapter: Any, part: Tensor) -> Tensor:
    """b' of one adapter, computed with the effective weight of that adapter."""
    site = next(site for site, other in zip(seam.sites, seam.adapters, strict=True) if other is adapter)

    def weight() -> Tensor:
        if seam.in_weights():
            return effective_parametrized(adapter, module, site.param, site.rows)
        effective = effective_tensor(adapter, module, site.param, site.rows)
        assert effective is not None
        return effective

    before = part if adapter.applies_strength else cast(part, adapter)
    return blend(adapter, lambda bias: adapter.bias(bias, weight), before).to(part.dtype)


class BiasForm(Adapter):
    """The bias form of an adapter as the weight form of a bias: y = W' x + b'.

    Args:
        adapter: the trained adapter; not a child module, because it is a child of the weight's seam.
        weight: returns the effective weight of the adapter.
    """

    def __init__(self, adapter: BiasAdapter, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.__dict__.update(adapter=adapter, effective_weight=weight)
        self._buffers["strength"] = adapter.strength

    @property
    def applies_strength(self) -> bool:  # type: ignore[override]
        """The flag of the adapter."""
        return bool(self.__dict__["adapter"].applies_strength)

    def weight(self, bias: Tensor) -> Tensor:
        """b'."""
        output: Tensor = self.__dict__["adapter"].bias(bias, self.__dict__["effective_weight"])
        return output


class EffectiveWeight:
    """Callable that returns the W that an adapter in a parametrization receives, with the changes of the adapters before it."""

    def __init__(self, tower: nn.Module, site: Any, adapter: nn.Module) -> None:
        self.tower, self.site, self.adapter = tower, site, adapter

    def __call__(self) -> Tensor:
        """The effective weight, in the rows of the site."""
        return effective_parametrized(self.adapter, module_at(self.tower, self.site.path), self.site.param, self.site.rows)


def constant_weight(weight: Tensor, rows: Sequence[int] | None) -> Callable[[], Tensor]:
    """Function that returns the rows of W before a merge, in single precision or wider."""

    def widened_rows() -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return wide if rows is None else wide[slice(*rows)]

    return widened_rows


def bias_site(site: Any, adapter: object) -> ParamSite:
    """The site of the bias in the layer of a weight site.

    Raises:
        UnsupportedSite: the layer has no bias.
    """
    if not site.bias:
        raise UnsupportedSite(
            f"{site.name}: {type(adapter).__name__} shifts the output, and the layer has no bias to add the shift to. "
            "Keep it unmerged, or select layers with a bias.",
            site=site.name,
            given=type(adapter).__name__,
            expected="bias",
        )
    owner, _, param = site.bias.rpartition(".")
    rows = getattr(site, "bias_rows", None)
    return ParamSite(
        name=f"{site.name}.shift",
        role=f"bias.{site.role}",
        component=site.component,
        path=owner,
        param=param,
        shape=(),
        rows=rows,
    )
