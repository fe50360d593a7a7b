"""Registries of methods and hosts by name. In this package the module is the registration; other packages use entry points."""

from __future__ import annotations

import difflib
import importlib
import inspect
from functools import cached_property
from typing import Any, Generic, TypeVar

from torch import nn

from veneer.discovery import Entry, find_entries

from .errors import UnknownName, VeneerError
from .host import Host
from .method import Method

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name. Listing names imports nothing; `get` imports one module.

    Args:
        base: class whose subclasses are registered.
        package: package whose modules are the names; modules and sub-packages that start with `_` are skipped.
        group: entry-point group of other distributions. The name of an entry point must equal the `name` of its class.
    """

    def __init__(self, base: Any, package: str, group: str) -> None:
        self.base: type[T] = base
        self.package, self.group = package, group
        self._registered: dict[str, type[T]] = {}
        self._imported: dict[str, type[T]] = {}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for entry in find_entries(self.package, self.group):
            if entry.name in found:
                raise VeneerError(
                    f"{self.group}: the name '{entry.name}' is provided twice, by {found[entry.name].source} and by "
                    f"{entry.source}. Rename one of them or uninstall one of the distributions.",
                    where=entry.name,
                    given=(found[entry.name].source, entry.source),
                )
            found[entry.name] = entry
        return found

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._entries, *self._registered})

    def source(self, name: str) -> str:
        """The distribution that provides `name`."""
        return "register()" if name in self._registered else self._entries[name].source

    def get(self, name: str) -> type[T]:
        """The class behind `name`.

        Raises:
            UnknownName: no class has this name; lists similar names.
        """
        if name in self._registered:
            return self._registered[name]
        if name not in self._entries:
            close = difflib.get_close_matches(name, self.names(), n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            message = f"{self.group}: no '{name}'.{hint} There are: {', '.join(self.names())}."
            kind = self.group.removeprefix("veneer.").removesuffix("s")
            raise UnknownName(message, name, kind, close, expected=tuple(self.names()))
        if name not in self._imported:
            self._imported[name] = self._import(self._entries[name])
        return self._imported[name]

    def _import(self, entry: Entry) -> type[T]:
        if entry.point is not None:
            cls = entry.point.load()
        else:
            module = importlib.import_module(entry.module or "")
            named = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == entry.module]
            cls = next((c for c in named if issubclass(c, self.base) and getattr(c, "name", None) == entry.name), None)
        if cls is None or not issubclass(cls, self.base) or cls.name != entry.name:
            raise VeneerError(
                f"{self.group}: '{entry.name}' from {entry.source} gave {cls!r}; expected a subclass of {self.base.__name__} "
                f"whose `name` is '{entry.name}'.",
                where=entry.name,
                given=cls,
                expected=self.base,
            )
        return cls

    def register(self, cls: type[T]) -> type[T]:
        """Adds a class to the registry of this process, for notebooks and tests. Usable as a decorator.

        Raises:
            VeneerError: the name is taken, or the class is not a subclass of `base` with a name.
        """
        name: str = getattr(cls, "name", "")
        if not name or not issubclass(cls, self.base):
            message = f"{self.group}: {cls!r} is not a subclass of {self.base.__name__} with a `name`."
            raise VeneerError(message, given=cls, expected=self.base)
        if name in self._entries or name in self._registered:
            message = f"{self.group}: the name '{name}' is already provided by {self.source(name)}."
            raise VeneerError(message, where=name, given=self.source(name))
        self._registered[name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Removes a class that `register` added."""
        del self._registered[name]

    def table(self) -> list[dict[str, Any]]:
        """One row per name, with the first line of the docstring of its class. Imports every module."""
        rows = []
        for name in self.names():
            cls: Any = self.get(name)
            doc = (inspect.getdoc(cls) or "").split("\n")[0]
            rows.append({"name": name, "source": self.source(name), "about": doc, "paper": getattr(cls, "paper", "")})
        return rows


methods: Registry[Method] = Registry(Method, "veneer.methods", "veneer.methods")
hosts: Registry[Host] = Registry(Host, "veneer.hosts", "veneer.hosts")


def host_of(model: nn.Module) -> Host | None:
    """The host that matches `model`, or None. A fallback is used only if no other host matches.

    Raises:
        VeneerError: two hosts match.
    """
    matching = [h for h in (hosts.get(name)() for name in hosts.names()) if h.matches(model)]
    preferred = [h for h in matching if not h.fallback] or matching
    if len(preferred) > 1:
        raise VeneerError(
            f"{type(model).__name__} is claimed by the hosts {', '.join(h.name for h in preferred)}; one must give way.",
            where=type(model).__name__,
            given=tuple(h.name for h in preferred),
        )
    return preferred[0] if preferred else None
