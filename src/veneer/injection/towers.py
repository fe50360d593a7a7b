"""Finds the towers of a model or pipeline, such as UNet and text encoders, and their sites."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from .errors import UnsupportedSite, VeneerError
from .host import Host
from .registry import host_of, hosts
from .sites import Site

_CACHE: ContextVar[dict[int, list[Tower]] | None] = ContextVar("tower_cache", default=None)
UNCONDITIONAL = "unconditional_"
"""Beginning of the name of a component that only predicts the unconditional branch of classifier-free guidance."""


@dataclass(frozen=True)
class Tower:
    """A model that a host matches: a bare model, or a component of a pipeline.

    Args:
        component: its attribute in the pipeline, or `""` for a bare model.
        main: True if patterns that name no tower select from it.
        components: all components of the pipeline.
        wrapped: True if the caller passed the wrapper that `torch.compile` returns.
    """

    component: str
    module: nn.Module
    host: Host
    main: bool
    components: Mapping[str, Any] = field(default_factory=dict, repr=False)
    wrapped: bool = False

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The tower's sites. In a pipeline their names start with the component.

        Raises:
            VeneerError: two sites have the same name.
        """
        prefix = f"{self.component}." if self.component else ""
        number = re.search(r"_\d+$", self.component)
        suffix = "_unconditional" if self.component.startswith(UNCONDITIONAL) else number[0] if number else ""
        sites = tuple(
            relabel(s, name=prefix + s.name, component=self.component, tower=(s.tower or self.host.tower) + suffix)
            for s in self.host.sites(self.module, self.component, self.components)
        )
        names = [s.name for s in sites]
        if len(set(names)) != len(names):
            duplicates = sorted({n for n in names if names.count(n) > 1})
            message = f"host {self.host.name} has several sites of the same name: {', '.join(duplicates[:5])}."
            raise VeneerError(message, where=self.host.name, given=tuple(duplicates))
        return sites


def relabel(site: Site, **labels: Any) -> Site:
    """`dataclasses.replace` without `__init__`, which is five times as fast."""
    copy = object.__new__(type(site))
    copy.__dict__.update(site.__dict__, **labels)
    return copy


def towers_of(model: Any, strict: bool = True) -> list[Tower]:
    """The towers of a module, or of anything with a `components` mapping.

    Raises:
        UnsupportedSite: `strict`, and no host matches the model.
    """
    cache = _CACHE.get()
    if cache is None:
        return _find_towers(model, strict)
    towers = cache.get(id(model)) or _find_towers(model, strict)
    cache[id(model)] = towers
    return towers


@contextlib.contextmanager
def cache_towers() -> Iterator[None]:
    """Caches towers and sites inside the block, until something is attached. Models must not be changed otherwise inside it."""
    token = _CACHE.set({})
    try:
        yield
    finally:
        _CACHE.reset(token)


def clear_tower_cache() -> None:
    """Clears the cache of `cache_towers`: sites may depend on attachments, such as the rows of a token-embedding table."""
    cache = _CACHE.get()
    if cache is not None:
        cache.clear()


def _find_towers(model: Any, strict: bool) -> list[Tower]:
    if isinstance(model, nn.Module):
        module = _unwrap(model)
        host = host_of(module)
        towers = [Tower("", module, host, True, wrapped=module is not model)] if host else []
    else:
        components = getattr(model, "components", None)
        if not isinstance(components, Mapping):
            raise TypeError(f"{type(model).__name__} is neither a torch module nor a pipeline with `components`.")
        modules = {k: _unwrap(m) for k, m in components.items() if isinstance(m, nn.Module)}
        matches = [(k, m, host_of(m)) for k, m in modules.items()]
        towers = [
            Tower(k, m, host, host.main and not k.startswith(UNCONDITIONAL), components, m is not components[k])
            for k, m, host in matches
            if host
        ]
        towers.sort(key=lambda t: not t.main)
    if strict and not towers:
        message = f"no host matches {type(model).__name__}. Available hosts: {', '.join(hosts.names())}."
        raise UnsupportedSite(message, given=type(model).__name__, supported_hosts=hosts.names())
    return towers


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrapper that `torch.compile` returns, or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def sites(model: Any) -> SiteTable:
    """All sites of a model or pipeline, where adapters can be attached. Print it for a table of roles, or iterate over it."""
    return SiteTable(tuple(s for tower in towers_of(model) for s in tower.sites))


@dataclass(frozen=True)
class SiteTable:
    """A sequence of sites that prints as a table: tower, role, type, number of sites, blocks and sizes."""

    all: tuple[Site, ...]

    def __iter__(self) -> Any:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> Site:
        return self.all[index]

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[Site]] = {}
        for site in self.all:
            groups.setdefault((site.tower, site.role, type(site).__name__), []).append(site)
        rows = [("tower", "role", "type", "sites", "blocks", "size")]
        rows += [(t, r, kind, str(len(g)), _depth_range(g), _sizes(g)) for (t, r, kind), g in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _depth_range(group: list[Site]) -> str:
    depths = sorted({s.depth for s in group if s.depth is not None})
    return "" if not depths else (str(depths[0]) if len(depths) == 1 else f"{depths[0]}–{depths[-1]}")


def _sizes(group: list[Site]) -> str:
    sizes = list(dict.fromkeys(_size(s) for s in group))
    return ", ".join(sizes[:3]) + (" …" if len(sizes) > 3 else "")


def _size(site: Any) -> str:
    shape = getattr(site, "weight_shape", None) or getattr(site, "shape", None)
    if shape is not None:
        return "×".join(str(n) for n in shape)
    return str(getattr(site, "width", ""))
