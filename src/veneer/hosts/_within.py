"""Sites of a model that is nested in another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from veneer.injection.registry import host_of
from veneer.injection.sites import Port, Site
from veneer.injection.towers import relabel

NAMES = ("name", "bias", "guard", "attention", "query_norm", "key_norm")


def nested_sites(model: nn.Module, path: str, tower: str = "", component: str = "") -> Iterator[Site]:
    """The sites that its host finds in the module at `path`, with names and paths relative to `model`.

    Args:
        tower: tower label of the sites; empty to keep theirs. `component`: of the model in a pipeline.
    Empty if the module has no host.
    """
    inner = model.get_submodule(path)
    host = host_of(inner)
    for site in host.sites(inner, component) if host is not None else ():
        yield relabel(site, tower=tower or site.tower, component=component, **_prefixed(site, path))


def _prefixed(site: Site, path: str) -> dict[str, Any]:
    """The fields that hold names, paths or ports, prefixed with `path`."""
    moved: dict[str, Any] = {}
    for name, value in vars(site).items():
        if isinstance(value, Port):
            moved[name] = Port(_join(path, value.path), value.side)
        elif isinstance(value, Site):
            moved[name] = relabel(value, **_prefixed(value, path))
        elif name in ("path", "head") or (name in NAMES and value):
            moved[name] = _join(path, value)
    return moved


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
