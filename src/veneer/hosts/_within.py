"""Sites of a model that is a part of another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from torch import nn

from veneer.injection.registry import host_of
from veneer.injection.sites import Port, Site

NAMES = ("name", "bias", "guard")


def within(model: nn.Module, path: str, tower: str = "", component: str = "") -> Iterator[Site]:
    """The sites that the host of the module at `path` finds in it, named and placed as seen from `model`.

    Args:
        tower: the tower word of the sites; empty for those that they have. `component`: of the model in a pipeline.
    No host for the module gives no sites.
    """
    inner = model.get_submodule(path)
    host = host_of(inner)
    for site in host.sites(inner, component) if host is not None else ():
        yield replace(site, tower=tower or site.tower, component=component, **_moved(site, path))


def _moved(site: Site, path: str) -> dict[str, Any]:
    """The fields that hold names, paths or ports, with `path` in front of them."""
    moved: dict[str, Any] = {}
    for field in fields(site):
        value = getattr(site, field.name)
        if isinstance(value, Port):
            moved[field.name] = Port(_join(path, value.path), value.side)
        elif field.name in ("path", "head") or (field.name in NAMES and value):
            moved[field.name] = _join(path, value)
    return moved


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
