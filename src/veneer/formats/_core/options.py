"""Validates the method options of a file: types, finiteness, and sizes that an adapter can have."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from veneer.injection.errors import OptionError

LARGEST = 1_000_000  # maximum absolute integer, such as a rank or a token id
MOST, PATTERNS, LONGEST = 20_000, 256, 10_000  # entries by site, entries by role pattern, characters of a string


def validate_options(method: type[Any], config: Mapping[str, Any]) -> None:
    """Raises unless each option has the type that the method's dataclass declares. Unknown options are left to the method.

    Args:
        config: option -> JSON value; `by_site` has such a mapping for each of its keys.
    Raises:
        ValueError: names the option, its value and the expected type.
    """
    hints = _hints(method)
    for name, value in config.items():
        if name == "by_site":
            _validate_by_site(method, value)
        elif name in hints and not is_valid(value, hints[name]):
            message = f"option {name} is {_shorten(value)}; expected {_type_name(hints[name])}"
            raise OptionError(message, option=name, method=method.name, given=_shorten(value), expected=_type_name(hints[name]))


def _validate_by_site(method: type[Any], value: Any) -> None:
    if not isinstance(value, Mapping) or not _is_small(value) or not all(isinstance(own, Mapping) for own in value.values()):
        message = f"option by_site is {_shorten(value)}; expected options for each of up to {MOST:,} sites"
        raise OptionError(message, option="by_site", method=method.name, given=_shorten(value), expected=MOST)
    for own in value.values():
        if "by_site" in own:
            raise OptionError("option by_site contains another by_site", option="by_site", method=method.name)
        validate_options(method, own)


def _hints(method: type[Any]) -> dict[str, Any]:
    """Declared types of the options; empty if they cannot be resolved, as for a class defined inside a function."""
    try:
        return {name: hint for name, hint in get_type_hints(method).items() if get_origin(hint) is not ClassVar}
    except NameError:
        return {}


def is_valid(value: Any, hint: Any) -> bool:
    """True if a JSON value is valid for an option of this type. Types without a JSON equivalent are not checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(is_valid(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and _are_valid(value, inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and _is_small(value) and all(is_valid(v, inner[1]) for v in value.values())
    if hint in (int, float, bool, str, type(None), None):
        return _is_valid_scalar(value, type(None) if hint is None else hint)
    return True


def _are_valid(values: Any, inner: tuple[Any, ...]) -> bool:
    if len(inner) == 2 and inner[1] is ...:
        return len(values) <= MOST and all(is_valid(value, inner[0]) for value in values)
    return len(values) == len(inner) and all(is_valid(value, one) for value, one in zip(values, inner, strict=True))


def _is_valid_scalar(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    return type(value) is kind and not (isinstance(value, str) and len(value) > LONGEST)


def _is_small(value: Mapping[Any, Any]) -> bool:
    by_name = sum(isinstance(key, str) and key.startswith("name:") for key in value)
    return by_name <= MOST and len(value) - by_name <= PATTERNS and all(isinstance(key, str) for key in value)


def _shorten(value: Any) -> str:
    text = "over 10³⁰" if isinstance(value, int) and abs(value) > 10**30 else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _type_name(hint: Any) -> str:
    return str(hint).replace("<class '", "").replace("'>", "").replace("typing.", "").replace("collections.abc.", "")
