"""Command-line flags from a config dataclass: names, types, defaults and help come from the class itself."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union


def add_flags(
    parser: argparse._ActionsContainer,
    config: type,
    positional: Sequence[str] = (),
    skip: Sequence[str] = (),
    prefix: str = "",
    taken: Collection[str] = (),
) -> set[str]:
    """One flag for each field of `config`; only those given end up in the parsed namespace.

    `bool` fields become `--name` and `--no-name`; tuples take several words; mappings take `key=value` words.

    Args:
        positional: fields that are given without a flag; required unless the field has a default.
        skip: fields without a flag.
        prefix: such as `lora`: the flags are `--lora.rank`, and also `--rank` if that is not among those `taken`.
    Returns:
        The flags added.
    """
    hints, words, added = typing.get_type_hints(config), help_of(config), set[str]()
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        name = f"{prefix}.{field.name}" if prefix else field.name
        described = _help(words.get(field.name, ""), field)
        settings: dict[str, Any] = {"help": described, "default": argparse.SUPPRESS, **_reader(hints[field.name])}
        if field.name in positional:
            parser.add_argument(field.name, **{**settings, **_count(field, settings)})
            continue
        flags = [f"--{name.replace('_', '-')}"]
        if prefix and (plain := f"--{field.name.replace('_', '-')}") not in taken:
            flags.append(plain)
        parser.add_argument(*flags, dest=name, **settings)
        added.update(flags)
    return added


def _count(field: dataclasses.Field[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """How many words a positional takes: it may be left out if its field has a default."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return {}
    return {"nargs": "*" if "nargs" in settings else "?", "default": None}


def _help(text: str, field: dataclasses.Field[Any]) -> str:
    shown = "" if field.default in (dataclasses.MISSING, None, "", ()) else f" (default: {field.default})"
    return (text + shown).replace("%", "%%")


def _reader(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of an annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        several = [a for a in options if typing.get_origin(a) is tuple]
        return _reader(several[0] if several else options[0])
    if origin is Literal:
        return {"choices": args}
    if origin is tuple:
        return {"nargs": "+" if Ellipsis in args else len(args), "type": _number_or(args[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is not None and issubclass(origin, Mapping):
        return {"nargs": "+", "type": _pair(args[1] if args else str), "metavar": "KEY=VALUE"}
    return {"type": hint if hint in (int, float, str, Path) else str}


def _number_or(kind: Any) -> Any:
    return kind if kind in (int, float, Path) else str


def _pair(kind: Any) -> Any:
    def read(text: str) -> tuple[str, Any]:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
        return key, kind(value) if kind in (int, float) else value

    return read


def values(config: type, found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of `config` that were given, in the types it wants."""
    start = f"{prefix}." if prefix else ""
    hints = typing.get_type_hints(config)
    given = {f.name: found[start + f.name] for f in dataclasses.fields(config) if found.get(start + f.name) is not None}
    return {name: _shaped(value, hints[name]) for name, value in given.items()}


def _shaped(value: Any, hint: Any) -> Any:
    if not isinstance(value, list):
        return value
    origins = {typing.get_origin(h) for h in (hint, *typing.get_args(hint))}
    if any(isinstance(o, type) and issubclass(o, Mapping) for o in origins if o is not None):
        return dict(value)
    one_or_more = typing.get_origin(hint) in (Union, types.UnionType) and str in typing.get_args(hint)
    return value[0] if len(value) == 1 and one_or_more else tuple(value)


def help_of(config: type) -> dict[str, str]:
    """Field name to its sentence in the class's docstring: `Args:` entries, `name, other: text` for several at once."""
    text = inspect.getdoc(config) or ""
    body = text.partition("Args:\n")[2]
    names = [f.name for f in dataclasses.fields(config)]
    start = re.compile(rf"(?<!\S)`?((?:{'|'.join(names)})(?:`?,\s+`?(?:{'|'.join(names)}))*)`?:\s", re.MULTILINE)
    block = "\n".join(itertools.takewhile(lambda line: not line or line.startswith(" "), body.splitlines()))
    entries = list(start.finditer(block))
    found: dict[str, str] = {}
    for entry, after in itertools.zip_longest(entries, entries[1:]):
        sentence = " ".join(block[entry.end() : after.start() if after else len(block)].split()).rstrip(".")
        for name in re.split(r"`?,\s+`?", entry.group(1)):
            found.setdefault(name, sentence)
    return found
