"""Methods: one module per method, in packages by kind, and their registry.

`veneer.methods.names()` lists every method, also those of other installed packages; `veneer.methods.get("lora")` is the class
of a method, whose fields are its options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.injection.method import Method
    from veneer.injection.registry import Registry

__all__ = ["get", "names", "register", "source", "table", "unregister"]


def names() -> list[str]:
    """All method names, sorted. Imports no method."""
    return _registry().names()


def get(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UnknownName: no method has this name; lists similar names.
    """
    return _registry().get(name)


def source(name: str) -> str:
    """The distribution that provides a method."""
    return _registry().source(name)


def table() -> list[dict[str, Any]]:
    """One row per method with `name`, `source`, `about` and `paper`. Imports every method."""
    return _registry().table()


def register(method: type[Method]) -> type[Method]:
    """Adds a method to the registry of this process, for notebooks and tests. Usable as a class decorator.

    Raises:
        VeneerError: the name is taken, or the class is not a `Method` with a name.
    """
    return _registry().register(method)


def unregister(name: str) -> None:
    """Removes a method that `register` added."""
    _registry().unregister(name)


def _registry() -> Registry[Method]:
    from veneer.injection.registry import methods

    return methods
