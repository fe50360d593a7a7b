"""Options that a file claims for a method: of the right types, finite, and of a size that an adapter can have."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from veneer.injection.errors import OptionError

LARGEST = 1_000_000  # whole number, such as a rank or the id of a token
MOST, PATTERNS, LONGEST = 20_000, 256, 10_000  # entries by site, those by role pattern, characters of a text


def refuse_options(method: type[Any], config: Mapping[str, Any]) -> None:
    """Raise unless each option is what the method's dataclass declares. Unknown ones are for the method itself to refuse.

    Args:
        config: option to JSON value; `by_site` has such a mapping for each of its keys.
    Raises:
        ValueError: names the option, what it is and what it should be.
    """
    hints = _hints(method)
    for name, value in config.items():
        if name == "by_site":
            _refuse_by_site(method, value)
        elif name in hints and not fits(value, hints[name]):
            message = f"option {name} is {_short(value)}; expected {_told(hints[name])}"
            raise OptionError(message, option=name, method=method.name, given=_short(value), expected=_told(hints[name]))


def _refuse_by_site(method: type[Any], value: Any) -> None:
    if not isinstance(value, Mapping) or not _few(value) or not all(isinstance(own, Mapping) for own in value.values()):
        message = f"option by_site is {_short(value)}; expected options for each of up to {MOST:,} sites"
        raise OptionError(message, option="by_site", method=method.name, given=_short(value), expected=MOST)
    for own in value.values():
        if "by_site" in own:
            raise OptionError("option by_site has a by_site in it", option="by_site", method=method.name)
        refuse_options(method, own)


def _hints(method: type[Any]) -> dict[str, Any]:
    """Declared types of the options; none where they cannot be told, as for a class inside a function."""
    try:
        return {name: hint for name, hint in get_type_hints(method).items() if get_origin(hint) is not ClassVar}
    except NameError:
        return {}


def fits(value: Any, hint: Any) -> bool:
    """True if a JSON value may stand for an option of this type. Types that JSON has no word for are not looked at."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and _fits_each(value, inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and _few(value) and all(fits(v, inner[1]) for v in value.values())
    if hint in (int, float, bool, str, type(None), None):
        return _plain(value, type(None) if hint is None else hint)
    return True


def _fits_each(values: Any, inner: tuple[Any, ...]) -> bool:
    if len(inner) == 2 and inner[1] is ...:
        return len(values) <= MOST and all(fits(value, inner[0]) for value in values)
    return len(values) == len(inner) and all(fits(value, one) for value, one in zip(values, inner, strict=True))


def _plain(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    return type(value) is kind and not (isinstance(value, str) and len(value) > LONGEST)


def _few(value: Mapping[Any, Any]) -> bool:
    named = sum(isinstance(key, str) and key.startswith("name:") for key in value)
    return named <= MOST and len(value) - named <= PATTERNS and all(isinstance(key, str) for key in value)


def _short(value: Any) -> str:
    text = "over 10³⁰" if isinstance(value, int) and abs(value) > 10**30 else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _told(hint: Any) -> str:
    return str(hint).replace("<class '", "").replace("'>", "").replace("typing.", "").replace("collections.abc.", "")
