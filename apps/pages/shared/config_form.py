"""Forms made from the fields of a config class, as the command line's flags are, so that new methods appear by themselves."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import gradio as gr

from veneer.flags import add_flags, help_of, values
from veneer.injection import OptionError

from ...workspace import bounded, shown

Kind = Literal["choice", "check", "text"]
USUAL = "usual"
"""The choice of what is usual."""


@dataclass(frozen=True)
class Field:
    """A field of a config class, as a form asks for it.

    Args:
        name: of the field. `help`: its sentence. `kind`: a list of `choices`, a box to check, or words to type.
        several: it takes more than one word, or `key=value` words. `default`: what is taken if nothing is given.
    """

    name: str
    help: str
    kind: Kind
    choices: tuple[str, ...]
    several: bool
    default: Any

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")


def fields_of(config: Any, only: Sequence[str] | None = None, skip: Sequence[str] = ()) -> list[Field]:
    """The fields of a config class.

    Args:
        config: a dataclass. `only`: these, in this order; None for all but `skip`.
    """
    hints, said = typing.get_type_hints(config), help_of(config)
    found = {f.name: _field(f, hints[f.name], said.get(f.name, "")) for f in dataclasses.fields(config)}
    names = [name for name in found if name not in skip] if only is None else only
    return [found[name] for name in names]


def _field(field: dataclasses.Field[Any], hint: Any, said: str) -> Field:
    options = list(_options(hint))
    literal = next((o for o in options if typing.get_origin(o) is Literal), None)
    several = any(_holds(o) for o in options)
    kind: Kind = "choice" if literal else "check" if bool in options else "text"
    default = None if field.default is dataclasses.MISSING else field.default
    said = re.sub(r"\bNone\b", "empty", said)  # as it is typed here
    return Field(field.name, said, kind, tuple(map(str, typing.get_args(literal))) if literal else (), several, default)


def _options(hint: Any) -> Iterator[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for option in typing.get_args(hint) if union else (hint,):
        if option is not type(None):
            yield option


def _holds(option: Any) -> bool:
    origin = typing.get_origin(option)
    return origin is tuple or (isinstance(origin, type) and issubclass(origin, Mapping))


def words_of(config: Any, fields: Sequence[Field], given: Sequence[Any], prefix: str = "") -> list[str]:
    """The flags of a command for what a form's parts hold; nothing for what was left as usual.

    Args:
        given: one value a field: a text, a choice or a truth. `prefix`: such as `lora`, for flags of a method.
    Raises:
        VeneerError: a value that the command would not take.
    """
    found = [word for field, value in zip(fields, given, strict=True) for word in _words(field, value, prefix)]
    _read(config, found, prefix)
    return found


def _words(field: Field, value: Any, prefix: str) -> list[str]:
    name = ((f"{prefix}." if prefix else "") + field.name).replace("_", "-")
    if field.kind == "check":
        return [] if value is None or bool(value) == bool(field.default) else [f"--{'' if value else 'no-'}{name}"]
    text = bounded("" if value is None else str(value), field.label)
    if text in ("", USUAL):
        return []
    if not field.several:
        return [f"--{name}={text}"]
    parts = text.replace(",", " ").split()
    if any(part.startswith("-") and not _number(part) for part in parts):
        message = f"{field.label}: {shown(text)!r} begins with '-'; expected words or numbers."
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


def _read(config: Any, words: Sequence[str], prefix: str) -> dict[str, Any]:
    """What a command makes of its words."""
    reader = _Reader(add_help=False, allow_abbrev=False)
    add_flags(reader, config, prefix=prefix)
    return values(config, vars(reader.parse_args(list(words))), prefix)


def part_of(field: Field, value: Any = None, **more: Any) -> Any:
    """A component that asks for a field; `value` is what is usual here, if that is not the default."""
    return _makes(field.kind)(**_told(field, value), **more)


def _makes(kind: Kind) -> Any:
    return {"choice": gr.Dropdown, "check": gr.Checkbox, "text": gr.Textbox}[kind]


def _told(field: Field, value: Any = None) -> dict[str, Any]:
    """What a component shows of a field."""
    usual = field.default if value is None else value
    told: dict[str, Any] = {"label": field.label, "info": field.help, "visible": True}
    if field.kind == "check":
        return {**told, "value": bool(usual)}
    if field.kind == "choice":
        choices = {"choices": [USUAL, *field.choices], "value": USUAL if usual is None else str(usual)}
        return {**told, **choices, "allow_custom_value": True}
    return {**told, "value": _text(value), "placeholder": _text(field.default) or USUAL}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return "" if value is None or value is dataclasses.MISSING else str(value)


@dataclass(frozen=True)
class Slots:
    """Parts of a form that are there before it is known of which class: enough of each kind for any of them."""

    parts: tuple[tuple[Kind, Any], ...]

    @staticmethod
    def build(forms: Sequence[Sequence[Field]], first: Sequence[Field] = (), usual: Mapping[str, Any] = {}) -> Slots:
        """Parts, inside the page: as many of each kind as one of `forms` has; filled for `first` as by `fill`, or hidden."""
        kinds: tuple[Kind, ...] = ("text", "choice", "check")
        counts = {kind: max((sum(f.kind == kind for f in form) for form in forms), default=0) for kind in kinds}
        waiting = {kind: iter([field for field in first if field.kind == kind]) for kind in kinds}
        fields = [(kind, next(waiting[kind], None)) for kind in kinds for _ in range(counts[kind])]
        return Slots(tuple((kind, part_of(f, usual.get(f.name), min_width=220) if f else _hidden(kind)) for kind, f in fields))

    @property
    def components(self) -> list[Any]:
        """In the order of what `fill` gives and `given` takes."""
        return [part for _, part in self.parts]

    def fill(self, fields: Sequence[Field], usual: Mapping[str, Any]) -> list[Any]:
        """The parts as a form for these fields; what is left over is hidden. `usual`: by name, where it is not the default."""
        placed = self._placed(fields)
        return [
            _makes(kind)(**_told(placed[i], usual.get(placed[i].name))) if i in placed else _makes(kind)(visible=False)
            for i, (kind, _) in enumerate(self.parts)
        ]

    def given(self, fields: Sequence[Field], values: Sequence[Any]) -> list[Any]:
        """The values of the parts, one a field."""
        place = {field.name: i for i, field in self._placed(fields).items()}
        return [values[place[field.name]] for field in fields]

    def _placed(self, fields: Sequence[Field]) -> dict[int, Field]:
        free = {kind: iter([i for i, (k, _) in enumerate(self.parts) if k == kind]) for kind in ("text", "choice", "check")}
        return {next(free[field.kind]): field for field in fields}


def _hidden(kind: Kind) -> Any:
    more: dict[str, Any] = {"choices": [], "allow_custom_value": True} if kind == "choice" else {}
    return _makes(kind)(label="option", visible=False, min_width=220, **more)
