"""Base of methods with trained keys and values in every attention, and other adapters at other sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from typing_extensions import Self

from veneer.injection.sites import Site, WeightSite
from veneer.methods.prompt.soft_prompts._prefix import PrefixAdapter, PrefixEncoder, PrefixMethod


class PrefixPartMethod(PrefixMethod):
    """Base of methods whose sites of output projections get the keys and values of `prefix_tuning`, and others other adapters."""

    prefix_roles: ClassVar[tuple[str, ...]] = ("attn.out", "xattn.out")

    def has_prefix(self, site: Any) -> bool:
        """True for an output projection, whose attention gets keys and values."""
        return isinstance(site, WeightSite) and site.role in self.prefix_roles

    def build_shared(self, sites: Sequence[Any]) -> PrefixEncoder | None:
        """The table and the hidden layer of the MLP of the keys and values; None without it or without attention."""
        attention = [site for site in sites if self.has_prefix(site)]
        return super().build_shared(attention) if attention else None

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Replaces the MLP by the keys and values that it computes. Returns the config without it."""
        parts = list(adapters)
        for _, adapter in parts:
            if not isinstance(adapter, PrefixAdapter):
                adapter._modules.pop("shared", None)
        return super().finalize((site, adapter) for site, adapter in parts if isinstance(adapter, PrefixAdapter))
