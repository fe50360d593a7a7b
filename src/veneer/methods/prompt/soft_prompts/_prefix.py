"""Trained keys and values of attention modules, as tables or computed by an MLP that all modules share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite

INITIAL_STD = 0.02


class PrefixEncoder(nn.Module):
    """tanh(W E + b): the table E (p, width) and the hidden layer (hidden, width) of the MLP that all attention modules share."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, width))
        self.layer = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        """(p, hidden)."""
        return self.layer(self.table).tanh()


class PrefixAdapter(Adapter):
    """Keys and values of one attention module: `keys` and `values` (p, width), or `out` (2 width, hidden) after the encoder."""

    shared: PrefixEncoder

    def __init__(self, site: WeightSite, tokens: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = site.heads or 1, dropout
        if hidden:
            self.out: nn.Linear | None = nn.Linear(hidden, 2 * site.d_in)
        else:
            self.out = None
            self._set_tables(INITIAL_STD * torch.randn(tokens, site.d_in), INITIAL_STD * torch.randn(tokens, site.d_in))

    def _set_tables(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Keys and values (p, width)."""
        if self.out is None:
            return self.keys, self.values
        keys, values = self.out(self.shared()).chunk(2, -1)
        return keys, values

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, p, width / heads)."""
        keys, values = (F.dropout(table, self.dropout, self.training) for table in self.tables())
        return keys.unflatten(-1, (self.heads, -1)).transpose(0, 1), values.unflatten(-1, (self.heads, -1)).transpose(0, 1)

    @torch.no_grad()
    def flatten(self) -> None:
        """Replaces the MLP by the keys and values that it computes."""
        if self.out is not None:
            keys, values = self.tables()
            self.out = None
            self._modules.pop("shared", None)
            self._set_tables(keys.clone(), values.clone())


class PrefixMethod(Method):
    """Base of methods with trained keys and values, whose subclasses have these options as fields."""

    needs: ClassVar[tuple[Need, ...]] = (
        Need(WeightSite, roles=("attn.out", "xattn.out"), where={"kind": ("linear",), "sdpa": True}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn.out", "xattn.out")
    fallback: ClassVar[tuple[str, ...]] = ()
    identity_at_start: ClassVar[bool] = False
    shared_options: ClassVar[tuple[str, ...]] = ("tokens", "hidden")

    tokens: int
    hidden: int
    dropout: float

    def check_prefix_options(self) -> None:
        """Raises `OptionError` for no tokens, a negative hidden width, or a dropout probability outside 0 to 1."""
        if self.tokens < 1:
            raise OptionError.of(self.name, "tokens", self.tokens, "at least 1")
        if self.hidden < 0:
            raise OptionError.of(self.name, "hidden", self.hidden, "at least 0")
        if not 0 <= self.dropout < 1:
            raise OptionError.of(self.name, "dropout", self.dropout, "in [0, 1)")
        if not self.hidden:  # without the MLP, sites share nothing
            object.__setattr__(self, "shared_options", ("hidden",))

    def build_shared(self, sites: Sequence[WeightSite]) -> PrefixEncoder | None:
        """The table and the hidden layer of the MLP, as wide as the widest attention; None without the MLP."""
        return PrefixEncoder(self.tokens, max(site.d_in for site in sites), self.hidden) if self.hidden else None

    def build(self, site: WeightSite) -> PrefixAdapter:
        """Keys and values, or the last layer of the MLP, of one attention module."""
        return PrefixAdapter(site, self.tokens, self.hidden, self.dropout)

    def count(self, site: WeightSite) -> int:
        """2·p·width, or 2·width·(hidden + 1) with the MLP."""
        return 2 * site.d_in * ((self.hidden + 1) if self.hidden else self.tokens)

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Replaces the MLP by the keys and values that it computes. Returns the config without it."""
        for _, adapter in adapters:
            adapter.flatten()
        options: dict[str, Any] = {"hidden": 0}
        return dataclasses.replace(self, **options)
