"""The bias that follows a weight, for adapters that change both: y = W' x + b'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedSite
from ..method import Adapter
from ..sites import ParamSite
from .adapter_calls import module_at
from .effective_weight import tensor_in_chain


class Shift(Adapter):
    """The `bias` form of an adapter, as a weight form of the bias that follows its weight.

    Args:
        adapter: what is trained; it is no child, because it lives beside its weight.
        weight: gives W as the adapter finds it.
    """

    def __init__(self, adapter: Any, weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.__dict__.update(adapter=adapter, find=weight)
        self._buffers["strength"] = adapter.strength

    @property
    def blends(self) -> bool:  # type: ignore[override]
        """As the adapter does."""
        return bool(self.__dict__["adapter"].blends)

    def weight(self, bias: Tensor) -> Tensor:
        """b'."""
        shifted: Tensor = self.__dict__["adapter"].bias(bias, self.__dict__["find"])
        return shifted


class Below:
    """W as an adapter finds it: with the changes of those that act on it before."""

    def __init__(self, tower: nn.Module, site: Any, adapter: Adapter) -> None:
        self.tower, self.site, self.adapter = tower, site, adapter

    def __call__(self) -> Tensor:
        """The rows of the site."""
        return tensor_in_chain(self.adapter, module_at(self.tower, self.site.path), self.site.param, self.site.rows)


def shift_site(site: Any, adapter: Adapter) -> ParamSite:
    """The place of the bias that follows a site's weight.

    Raises:
        UnsupportedSite: there is none.
    """
    if not site.bias:
        raise UnsupportedSite(
            f"{site.name}: {type(adapter).__name__} shifts the output, and the layer has no bias that could take the shift. "
            "Keep it beside the weight (no merge), or select layers with a bias.",
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


def fixed(weight: Tensor, rows: tuple[int, int] | None) -> Callable[[], Tensor]:
    """W in a merge: the tensor as it is before it."""

    def find() -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return wide if rows is None else wide[slice(*rows)]

    return find
