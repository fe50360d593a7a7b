"""Errors of the package. Each says where, what was given, what was expected and what to do, and carries these as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

E = TypeVar("E", bound="VeneerError")


class VeneerError(Exception):
    """Base of every error that veneer raises on purpose.

    The attributes are keyword arguments of the constructor and survive pickling. They are None where they do not apply.

    Attributes:
        where: name of what the error is about, such as a module, a tensor, an attachment or a metadata field.
        given: the value, shape, names or state that was found. expected: what is accepted in its place.
        file: path of the file that was read or written.
    """

    def __init__(
        self, message: str = "", *, where: str | None = None, given: Any = None, expected: Any = None, file: Any = None
    ) -> None:
        super().__init__(message)
        self.where, self.given, self.expected = where, given, expected
        self.file: Any = None if file is None else str(file)

    @classmethod
    def from_error(cls: type[E], error: BaseException, message: str, **data: Any) -> E:
        """An error of this class with `data`, and with the other attributes of `error` that this class has as well.

        The site of an `UnsupportedSite` is `where` in a class that has no sites.
        """
        made = cls(message, **data)
        made.where = made.where or getattr(error, "site", None) or None
        for name, value in vars(error).items():
            if name in vars(made) and name not in data and value is not None:
                setattr(made, name, value)
        return made


class OptionError(VeneerError, ValueError):
    """An option of a method, or an argument of a call, with a value that is not accepted.

    Attributes, beside those of `VeneerError`:
        option: its name. method: name of the method or the function that has it.
    """

    def __init__(self, message: str = "", *, option: str = "", method: str = "", **data: Any) -> None:
        super().__init__(message, **data)
        self.option, self.method = option, method

    @classmethod
    def of(cls, method: str, option: str, given: object, expected: str) -> OptionError:
        """The error for one option of a method; `expected` completes "must be", such as "at least 1"."""
        message = f"{method}: {option} must be {expected}, got {given!r}"
        return cls(message, option=option, method=method, given=given, expected=expected)

    @classmethod
    def check(cls, method: Any, checks: Mapping[str, tuple[bool, str]]) -> None:
        """Raises the error for the first invalid option of a method. `checks`: option to (is valid, expected, as for `of`)."""
        for option, (is_valid, expected) in checks.items():
            if not is_valid:
                raise cls.of(method.name, option, getattr(method, option), expected)


class MissingExtra(VeneerError, ImportError):
    """A library that is not installed, which an extra of the package installs.

    Attributes, beside those of `VeneerError`:
        library: name of its module. extra: for `pip install "veneer[EXTRA]"`.
    """

    def __init__(self, message: str = "", *, library: str = "", extra: str = "", **data: Any) -> None:
        super().__init__(message, **data)
        self.library, self.extra = library, extra


class UnknownName(VeneerError):
    """A method or host name that no file and no installed package provides.

    Attributes, beside those of `VeneerError`:
        name: as given. kind: of what, such as `method`. close: the names spelled most like it.
    """

    def __init__(self, message: str = "", name: str = "", kind: str = "name", close: Sequence[str] = (), **data: Any) -> None:
        super().__init__(message, **data)
        self.name, self.kind, self.close = name, kind, tuple(close)


class UnknownOption(UnknownName, TypeError):
    """An option that a method does not have; `where` is the method, `expected` has the options there are."""


class SelectionError(VeneerError):
    """A `where=` pattern, or an alternative of one, that matches nothing or has no effect, or two that match one tensor.

    Attributes, beside those of `VeneerError`:
        pattern: the alternative that is rejected, or "".
    """

    def __init__(self, message: str = "", *, pattern: str = "", **data: Any) -> None:
        super().__init__(message, **data)
        self.pattern = pattern


class UnsupportedSite(VeneerError):
    """A method cannot work on a site: what the method needs and what the host offers differ.

    Attributes, beside those of `VeneerError`, empty where they do not apply:
        site: name of the rejected site. `method`, `host`: names. `supported_hosts`: names of the hosts that the method supports.
        option: name of the option whose value does not fit the site.
    """

    def __init__(
        self,
        message: str = "",
        *,
        site: str = "",
        method: str = "",
        host: str = "",
        supported_hosts: Sequence[str] = (),
        option: str = "",
        **data: Any,
    ) -> None:
        super().__init__(message, **data)
        self.site, self.method, self.host, self.option = site, method, host, option
        self.supported_hosts = tuple(supported_hosts)


class DeadSite(VeneerError):
    """An adapter that is attached but never used, or a parameter that no output depends on; `given` has their names."""


class BlockedGradient(VeneerError):
    """A layer of the host stops gradients, so that adapters before it cannot train.

    `where` is the path of the first such layer, `given` those of all.
    """


class HostChanged(VeneerError):
    """The host was compiled, sharded, fused or rebuilt in a way that drops or bypasses adapters."""


class StateError(VeneerError):
    """A call that does not fit the attachment's state, such as unmerging what is not merged.

    `where` is the attachment's name, `given` its state, such as "merged", "detached" or "disabled".
    """


class NotSelected(StateError):
    """A method whose trained entries are not selected yet runs with gradients; `given` is the method's name."""


class EmptySelection(VeneerError):
    """A selection of entries without a usable score: no sample, or gradients that are all zero or not finite.

    `where` is the method, `given` the number of samples, or "zero" or "not finite".
    """


class SaveError(VeneerError):
    """A file that could not be written whole; what was there before is as it was."""


class LoadError(VeneerError):
    """A file that does not fit: missing, unused or misshapen tensors, another base, unknown method or version.

    Attributes, beside those of `VeneerError`, empty where they do not apply:
        missing, unused: names of tensors. misshapen: by name the shape (or dtype) that was found and the one expected.
        family: the family of base models that the file was made for, where its names and shapes tell.
        option: name of the option that does not fit: in the file's config, or of the attachment that it should go into.
    """

    def __init__(
        self,
        message: str = "",
        *,
        missing: Sequence[str] = (),
        unused: Sequence[str] = (),
        misshapen: Mapping[str, tuple[Any, Any]] | None = None,
        family: str = "",
        option: str = "",
        **data: Any,
    ) -> None:
        super().__init__(message, **data)
        self.missing, self.unused = tuple(missing), tuple(unused)
        self.misshapen, self.family, self.option = dict(misshapen or {}), family, option


class ConditionError(VeneerError):
    """A condition that is missing, of the wrong size, or given to the wrong model; `where` names attachment or condition."""


class BaseModelError(VeneerError):
    """A base model that is missing, incomplete, not in safetensors or of an unsupported class."""


class VeneerWarning(UserWarning):
    """Base of the warnings of veneer; the attributes are those of `VeneerError`."""

    def __init__(
        self, message: str = "", *, where: str | None = None, given: Any = None, expected: Any = None, file: Any = None
    ) -> None:
        super().__init__(message)
        self.where, self.given, self.expected = where, given, expected
        self.file = None if file is None else str(file)
