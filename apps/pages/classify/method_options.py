"""Options of methods as text: `lora.rank=16 vpt.tokens=20`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.injection import OptionError, UnknownOption
from veneer.injection import methods as registry
from veneer.training.method_names import split_methods

from ...limits import LIMITS
from ...workspace import check_text, printable
from ..shared.config_form import Field, fields_of, flags_of

FIELD = "method options"
EXPECTED = "METHOD.OPTION=VALUE, such as lora.rank=16"
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def method_options(text: str, methods: Sequence[str]) -> dict[str, list[str]]:
    """Flags of each method of a form; a method of several joined by `+` has those of its parts.

    Args:
        text: options separated by spaces, with quotes around a value with spaces.
        methods: as chosen in the form.
    Raises:
        OptionError: text of another form, a method that is not chosen, or a value that the command would reject.
        UnknownOption: the method has no such option.
    """
    options: dict[str, dict[str, str]] = {name: {} for method in methods for name in _names(method)}
    for part in _split(check_text(text or "", FIELD, LIMITS.config_text)):
        match = re.fullmatch(r"(\w+)\.([\w-]+)=(.*)", part, re.DOTALL)
        if match is None:
            message = f"{FIELD}: {printable(part)}; expected {EXPECTED}."
            raise OptionError(message, option=FIELD, given=part, expected=EXPECTED)
        name, option, value = match.groups()
        if name not in options:
            message = f"{FIELD}: {printable(part)}, but the methods are {', '.join(options)}; expected options of these."
            raise OptionError(message, option=FIELD, given=name, expected=tuple(options))
        options[name][option.replace("-", "_")] = value
    flags = {name: _flags(name, values) for name, values in options.items()}
    return {method: [flag for name in _names(method) for flag in flags[name]] for method in methods}


def _flags(name: str, values: Mapping[str, str]) -> list[str]:
    method: Any = registry.get(name)
    fields = {field.name: field for field in fields_of(method)} if values else {}
    for option in values:
        if option not in fields:
            message = f"{FIELD}: {name} has no option {printable(option)}; expected one of {', '.join(fields)}."
            raise UnknownOption(message, option, "option", given=option, expected=tuple(fields), where=name)
    chosen = [fields[option] for option in values]
    return flags_of(method, chosen, [_entry(field, f"{name}.{field.name}", values[field.name]) for field in chosen], name)


def _entry(field: Field, name: str, value: str) -> str | bool:
    """Value of a form field: True or False of a checkbox, else the text."""
    if field.kind != "check":
        return value
    if value.lower() not in (*TRUE, *FALSE):
        message = f"{FIELD}: {name} is {printable(value)}; expected true or false."
        raise OptionError(message, option=name, given=value, expected="true or false")
    return value.lower() in TRUE


def _names(method: str) -> list[str]:
    return [] if method == "zero_shot" else split_methods(method)


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        message = f"{FIELD}: {error}; expected {EXPECTED}."
        raise OptionError(message, option=FIELD, given=text, expected=EXPECTED) from error
