"""Errors of the registry. Each says where, what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class VeneerError(Exception):
    """Base of every error that veneer raises on purpose."""


class UnknownName(VeneerError):
    """A method or host name that no file and no installed package provides.

    Attributes:
        name: as given. kind: of what, such as `method`. close: the names spelled most like it.
    """

    def __init__(self, message: str, name: str = "", kind: str = "name", close: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.name, self.kind, self.close = name, kind, tuple(close)


class SelectionError(VeneerError):
    """A `where=` pattern, or an alternative of one, that matches nothing or has no effect, or two that match one tensor.

    Attributes:
        pattern: the alternative that is rejected, or "".
    """

    def __init__(self, message: str, *, pattern: str = "") -> None:
        super().__init__(message)
        self.pattern = pattern


class UnsupportedSite(VeneerError):
    """A method cannot work on a site: what the method needs and what the host offers differ.

    Attributes, empty where they do not apply:
        site: name of the rejected site. `method`, `host`: names. `fits`: names of the hosts that the method supports.
    """

    def __init__(self, message: str, *, site: str = "", method: str = "", host: str = "", fits: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.site, self.method, self.host, self.fits = site, method, host, tuple(fits)


class DeadSite(VeneerError):
    """An adapter that is attached but never used, or a parameter that no output depends on."""


class HostChanged(VeneerError):
    """The host was compiled, sharded, fused or rebuilt in a way that drops or bypasses adapters."""


class StateError(VeneerError):
    """A call that does not fit the attachment's state, such as unmerging what is not merged."""


class SaveError(VeneerError):
    """A file that could not be written whole; what was there before is as it was."""


class LoadError(VeneerError):
    """A file that does not fit: missing, unused or misshapen tensors, another base, unknown method or version."""


class ConditionError(VeneerError):
    """A condition that is missing, of the wrong size, or given to the wrong model."""
