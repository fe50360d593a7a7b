"""From a model or a pipeline to its towers and their sites."""

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

_KEPT: ContextVar[dict[int, list[Tower]] | None] = ContextVar("towers_kept", default=None)


@dataclass(frozen=True)
class Tower:
    """One model that a host describes.

    Args:
        component: its attribute in the pipeline, or `""` for a bare model.
        main: True if a pattern without a tower means it.
        wrapped: True if it was given inside the wrapper that `torch.compile` returns.
    """

    component: str
    module: nn.Module
    host: Host
    main: bool
    components: Mapping[str, Any] = field(default_factory=dict, repr=False)
    wrapped: bool = False

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The tower's sites, named from the pipeline's point of view.

        Raises:
            VeneerError: two sites of one name.
        """
        prefix = f"{self.component}." if self.component else ""
        number = re.search(r"_\d+$", self.component)
        suffix = number[0] if number else ""
        found = tuple(
            _renamed(s, name=prefix + s.name, component=self.component, tower=(s.tower or self.host.tower) + suffix)
            for s in self.host.sites(self.module, self.component, self.components)
        )
        names = [s.name for s in found]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            message = f"host {self.host.name} gives two sites the same name: {', '.join(twice[:5])}."
            raise VeneerError(message, where=self.host.name, given=tuple(twice))
        return found


def _renamed(site: Site, **labels: str) -> Site:
    """`dataclasses.replace`, in a fifth of its time: sites have nothing but fields."""
    renamed = object.__new__(type(site))
    renamed.__dict__.update(site.__dict__, **labels)
    return renamed


def towers_of(model: Any, strict: bool = True) -> list[Tower]:
    """The towers of a module, or of anything with a `components` mapping.

    Raises:
        UnsupportedSite: `strict`, and no host knows the model.
    """
    known = _KEPT.get()
    if known is None:
        return _found(model, strict)
    towers = known.get(id(model)) or _found(model, strict)
    known[id(model)] = towers
    return towers


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside it, each model's sites are looked for once, until something is attached. Nothing else may change a model there."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def forget() -> None:
    """Look anew inside `kept`: what a host offers may depend on what is attached, such as new words."""
    found = _KEPT.get()
    if found is not None:
        found.clear()


def _found(model: Any, strict: bool) -> list[Tower]:
    if isinstance(model, nn.Module):
        bare, host = _bare(model), host_of(_bare(model))
        found = [Tower("", bare, host, True, wrapped=bare is not model)] if host else []
    else:
        components = getattr(model, "components", None)
        if not isinstance(components, Mapping):
            raise TypeError(f"{type(model).__name__} is neither a torch module nor a pipeline with `components`.")
        known = {k: (_bare(m), host_of(_bare(m))) for k, m in components.items() if isinstance(m, nn.Module)}
        found = [Tower(k, m, h, h.main, components, m is not components[k]) for k, (m, h) in known.items() if h]
        found.sort(key=lambda t: not t.main)
    if strict and not found:
        message = f"no host knows {type(model).__name__}. There are hosts for: {', '.join(hosts.names())}."
        raise UnsupportedSite(message, given=type(model).__name__, fits=hosts.names())
    return found


def _bare(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile` returns."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def sites(model: Any) -> SiteTable:
    """What can be adapted: every site of a model or pipeline. Print it for a table of roles, or iterate over it."""
    return SiteTable(tuple(s for tower in towers_of(model) for s in tower.sites))


@dataclass(frozen=True)
class SiteTable:
    """A tuple of sites that prints as a table: tower, role, type, how many, in which blocks, and sizes."""

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
        rows += [(t, r, kind, str(len(g)), _span(g), _sizes(g)) for (t, r, kind), g in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _span(group: list[Site]) -> str:
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
