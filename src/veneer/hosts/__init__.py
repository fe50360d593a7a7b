"""Hosts: one module per model family, which lists the sites that methods can adapt, and their registry.

`veneer.hosts.names()` lists every host, also those of other installed packages; `veneer.hosts.get("timm_vit")` is the class
of a host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.injection.host import Host
    from veneer.injection.registry import Registry

__all__ = ["get", "names", "register", "source", "table", "unregister"]


def names() -> list[str]:
    """All host names, sorted. Imports no host."""
    return _registry().names()


def get(name: str) -> type[Host]:
    """The class of a host.

    Raises:
        UnknownName: no host has this name; lists similar names.
    """
    return _registry().get(name)


def source(name: str) -> str:
    """The distribution that provides a host."""
    return _registry().source(name)


def table() -> list[dict[str, Any]]:
    """One row per host with `name`, `source` and `about`. Imports every host."""
    return _registry().table()


def register(host: type[Host]) -> type[Host]:
    """Adds a host to the registry of this process, for notebooks and tests. Usable as a class decorator.

    Raises:
        VeneerError: the name is taken, or the class is not a `Host` with a name.
    """
    return _registry().register(host)


def unregister(name: str) -> None:
    """Removes a host that `register` added."""
    _registry().unregister(name)


def _registry() -> Registry[Host]:
    from veneer.injection.registry import hosts

    return hosts
