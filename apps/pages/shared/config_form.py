"""Forms generated from config classes, as command-line flags are, so that new methods need no interface code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import gradio as gr

from veneer.flags import add_flags, fields_in_order, help_of, values
from veneer.injection import OptionError

from ...workspace import check_text, printable

Kind = Literal["choice", "check", "text"]
DEFAULT = "default"
"""Dropdown choice that keeps the default."""


@dataclass(frozen=True)
class Field:
    """A form field for a field of a config class.

    Args:
        name: of the field. `help`: from its docstring. `kind`: dropdown of `choices`, checkbox or text box.
        multiple: accepts several values, or `key=value` pairs. `default`: of the config class.
        commas: spaces and commas separate several values; False if only spaces do, because a value may contain commas.
        only: values other than `choices` are rejected.
    """

    name: str
    help: str
    kind: Kind
    choices: tuple[str, ...]
    multiple: bool
    default: Any
    commas: bool = True
    only: bool = False

    @property
    def label(self) -> str:
        """Name shown on the page."""
        return self.name.replace("_", " ")


def fields_of(config: Any, include: Sequence[str] | None = None, skip: Sequence[str] = ()) -> list[Field]:
    """Form fields of a config class.

    Args:
        config: a dataclass. `include`: names in order; by default all except `skip`.
    """
    hints, texts = typing.get_type_hints(config), help_of(config)
    all_fields = {f.name: _field(f, hints[f.name], texts.get(f.name, "")) for f in fields_in_order(config)}
    names = [name for name in all_fields if name not in skip] if include is None else include
    return [all_fields[name] for name in names]


def with_choices(fields: Sequence[Field], choices: Mapping[str, Sequence[str]]) -> list[Field]:
    """The fields, with dropdowns for those in `choices`, by name; other values than these are errors."""
    return [
        dataclasses.replace(f, kind="choice", choices=tuple(choices[f.name]), default=None, only=True) if f.name in choices else f
        for f in fields
    ]


def _field(field: dataclasses.Field[Any], hint: Any, texts: str) -> Field:
    options = list(_options(hint))
    literal = next((o for o in options if typing.get_origin(o) is Literal), None)
    multiple = any(_is_collection(o) for o in options)
    kind: Kind = "choice" if literal else "check" if bool in options else "text"
    default = None if field.default is dataclasses.MISSING else field.default
    choices = tuple(map(str, typing.get_args(literal))) if literal else ()
    nested = any(_is_collection(argument) for o in options for argument in typing.get_args(o))
    return Field(field.name, form_help(texts), kind, choices, multiple, default, commas=not nested)


def form_help(text: str) -> str:
    """Help of an option for its form field: an empty field means None, and Python notation is left out.

    The help of a field is Markdown that reads two asterisks as emphasis, in code too.
    """
    text = re.sub(r"\bNone\b", "empty", text)
    text = re.sub(r"( as a flag)?, in Python `[^`]*`", "", text)
    return text if text.count("*") < 2 else text.replace("*", "\N{ASTERISK OPERATOR}")


def _options(hint: Any) -> Iterator[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for option in typing.get_args(hint) if union else (hint,):
        if option is not type(None):
            yield option


def _is_collection(option: Any) -> bool:
    origin = typing.get_origin(option)
    return origin is tuple or (isinstance(origin, type) and issubclass(origin, Mapping))


def flags_of(config: Any, fields: Sequence[Field], entries: Sequence[Any], prefix: str = "") -> list[str]:
    """Command-line flags for the values of a form; defaults are left out.

    Args:
        entries: one value per field: a text, a choice or a bool. `prefix`: such as `lora`, for options of a method.
    Raises:
        VeneerError: a value that the command would reject.
    """
    flags = [word for field, value in zip(fields, entries, strict=True) for word in _flags(field, value, prefix)]
    check_flags(config, flags, prefix)
    return flags


def values_of(config: Any, fields: Sequence[Field], entries: Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Values of a form by the names of the fields; defaults are left out. See `flags_of`."""
    return check_flags(config, flags_of(config, fields, entries, prefix), prefix)


def _flags(field: Field, value: Any, prefix: str) -> list[str]:
    name = ((f"{prefix}." if prefix else "") + field.name).replace("_", "-")
    if field.kind == "check":
        return [] if value is None or bool(value) == bool(field.default) else [f"--{'' if value else 'no-'}{name}"]
    text = check_text("" if value is None else str(value), field.label)
    if text in ("", DEFAULT):
        return []
    if field.only and text not in field.choices:
        message = f"{field.label}: {printable(text)!r} is not available; expected one of {', '.join(field.choices)}."
        raise OptionError(message, option=field.name, given=text, expected=field.choices)
    if not field.multiple:
        return [f"--{name}={text}"]
    parts = (text.replace(",", " ") if field.commas else text).split()
    if any(part.startswith("-") and not _number(part) for part in parts):
        message = f"{field.label}: {printable(text)!r} begins with '-'; expected names or numbers."
        raise OptionError(message, option=field.name, given=text)
    return [f"--{name}", *parts]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Reader(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.replace("argument ", "").replace("--", "")
        wrong = re.match(r"([\w.-]+)[\w./-]*: invalid (int value|float value|choice): ('[^']*'|.*)", message, re.DOTALL)
        name, kind, value = wrong.groups() if wrong else (message.partition(":")[0], "", "")
        if kind.endswith("value"):
            message = f"{name.replace('-', ' ')} is {value}; expected a {'whole number' if kind[0] == 'i' else 'number'}."
        raise OptionError(message, option=name.replace("-", "_"), given=value.strip("'"))


def check_flags(config: Any, flags: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Parses flags as the command does.

    Raises:
        OptionError: a value that the command would reject.
    """
    reader = _Reader(add_help=False, allow_abbrev=False)
    add_flags(reader, config, prefix=prefix)
    return values(config, vars(reader.parse_args(list(flags))), prefix)


def component_of(field: Field, value: Any = None, **more: Any) -> Any:
    """Component for a field; `value` replaces the default of the config class."""
    return _component(field.kind)(**_properties(field, value), **more)


def _component(kind: Kind) -> Any:
    return {"choice": gr.Dropdown, "check": gr.Checkbox, "text": gr.Textbox}[kind]


def _properties(field: Field, value: Any = None) -> dict[str, Any]:
    """Properties of the component for a field."""
    default = field.default if value is None else value
    properties: dict[str, Any] = {"label": field.label, "info": field.help, "visible": True}
    if field.kind == "check":
        return {**properties, "value": bool(default)}
    if field.kind == "choice":
        choices = {"choices": [DEFAULT, *field.choices], "value": DEFAULT if default is None else str(default)}
        return {**properties, **choices, "allow_custom_value": True}
    return {**properties, "value": text_of(value), "placeholder": text_of(field.default) or DEFAULT}


def text_of(value: Any) -> str:
    """Text of a value in a text box, which `flags_of` reads again."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}:{_pairs(v)}" if isinstance(v, Mapping) else f"{k}={v}" for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return "" if value is None or value is dataclasses.MISSING else str(value)


def _pairs(options: Mapping[str, Any]) -> str:
    """Options of a pattern, with values as JSON unless they are text."""
    return ",".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items())


@dataclass(frozen=True)
class Slots:
    """Preallocated form components, enough of each kind for any of several config classes."""

    parts: tuple[tuple[Kind, Any], ...]

    @staticmethod
    def build(forms: Sequence[Sequence[Field]], first: Sequence[Field] = (), defaults: Mapping[str, Any] = {}) -> Slots:
        """Creates the components: the maximum per kind over `forms`, filled for `first` as by `fill`, the others hidden."""
        kinds: tuple[Kind, ...] = ("text", "choice", "check")
        counts = {kind: max((sum(f.kind == kind for f in form) for form in forms), default=0) for kind in kinds}
        unassigned = {kind: iter([field for field in first if field.kind == kind]) for kind in kinds}
        fields = [(kind, next(unassigned[kind], None)) for kind in kinds for _ in range(counts[kind])]
        return Slots(
            tuple((kind, component_of(f, defaults.get(f.name), min_width=220) if f else _hidden(kind)) for kind, f in fields)
        )

    @property
    def components(self) -> list[Any]:
        """Components in the order of `fill` and `entries`."""
        return [part for _, part in self.parts]

    def fill(self, fields: Sequence[Field], defaults: Mapping[str, Any]) -> list[Any]:
        """Updates that show these fields and hide the rest. `defaults`: by name, override those of the config class."""
        assigned = self._assign(fields)
        return [
            _component(kind)(**_properties(assigned[i], defaults.get(assigned[i].name)))
            if i in assigned
            else _component(kind)(visible=False)
            for i, (kind, _) in enumerate(self.parts)
        ]

    def entries(self, fields: Sequence[Field], values: Sequence[Any]) -> list[Any]:
        """Values of the components, one per field."""
        index = {field.name: i for i, field in self._assign(fields).items()}
        return [values[index[field.name]] for field in fields]

    def _assign(self, fields: Sequence[Field]) -> dict[int, Field]:
        unused = {kind: iter([i for i, (k, _) in enumerate(self.parts) if k == kind]) for kind in ("text", "choice", "check")}
        return {next(unused[field.kind]): field for field in fields}


def _hidden(kind: Kind) -> Any:
    more: dict[str, Any] = {"choices": [], "allow_custom_value": True} if kind == "choice" else {}
    return _component(kind)(label="option", visible=False, min_width=220, **more)
