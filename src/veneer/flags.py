"""Command-line flags of a config dataclass: names, types, defaults and help texts come from the class."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from veneer.command_line.flag_groups import group_of, groups_of
from veneer.command_line.help_text import choices_placeholder, placeholder, with_default, with_flags

METAVARS = {int: "N", float: "X", Path: "PATH"}
"""Type to the placeholder of its values in help texts."""


def add_flags(
    parser: argparse._ActionsContainer,
    config: type,
    positional: Sequence[str] = (),
    skip: Sequence[str] = (),
    prefix: str = "",
    taken: Collection[str] = (),
    required: bool = True,
    grouped: bool = False,
) -> set[str]:
    """Adds one flag per field of `config`. The parsed namespace has only the fields that were passed.

    A `_` at the end of a field, for a name that Python reserves, is left out of the flag.
    `bool` fields become `--name` and `--no-name`; tuples accept several values; mappings accept `key=value`, mappings of options
    `pattern:option=value,option=value`, and tuples of mappings `key=value,key=value`.

    Args:
        positional: fields that are positional arguments.
        required: whether a positional argument whose field has no default is required.
        skip: fields without a flag.
        prefix: prefix such as `lora`: the flags are `--lora.rank`, and also `--rank` if it is not in `taken`.
        taken: flags that the parser already has.
        grouped: list the flags by the titles of `flag_groups`.
    Returns:
        The added flags.
    """
    hints, texts, added = typing.get_type_hints(config), help_of(config), set[str]()
    fields = [field for field in fields_in_order(config) if field.name not in skip]
    flags_of = {f.name: _flags(f.name, prefix, taken) for f in fields if f.name not in positional}
    groups, table = dict[str | None, argparse._ActionsContainer](), groups_of(flags_of)
    if grouped:
        groups = _argument_groups(parser, flags_of, table)
        order = {name: place for place, name in enumerate(itertools.chain(*table.values()))}
        fields.sort(key=lambda field: order.get(field.name, 0))
    for field in fields:
        name = f"{prefix}.{field.name}" if prefix else field.name
        text = _help(texts.get(field.name, ""), field, flags_of)
        settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, **_settings_of(field, hints[field.name])}
        if field.name in positional:
            settings.pop("metavar", None)
            optional = not required or field.name not in required_fields(config)
            parser.add_argument(field.name, **{**settings, **(_optional_positional(settings) if optional else {})})
            continue
        flags = flags_of[field.name]
        groups.get(group_of(field.name, table), parser).add_argument(*flags, dest=name, **settings)
        added.update(flags)
    return added


def _flags(name: str, prefix: str, taken: Collection[str]) -> list[str]:
    """The flags of a field: with a prefix first that with it, and then the one without it, unless it is taken."""
    plain = f"--{name.rstrip('_').replace('_', '-')}"
    long = f"--{prefix.replace('_', '-')}.{plain[2:]}" if prefix else plain
    return [long] if long == plain or plain in taken else [long, plain]


def _argument_groups(
    parser: argparse._ActionsContainer, names: Collection[str], table: Mapping[str, Sequence[str]]
) -> dict[str | None, argparse._ActionsContainer]:
    """An argument group for each title that has one of these fields."""
    return {title: parser.add_argument_group(title) for title, fields in table.items() if {*fields} & {*names}}


def fields_in_order(config: Any) -> list[dataclasses.Field[Any]]:
    """Fields of a dataclass; keyword-only ones, which methods have in common, last."""
    return sorted(dataclasses.fields(config), key=lambda field: field.kw_only is True)


def required_fields(config: Any) -> list[str]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(config) if f.default is missing and f.default_factory is missing]


def _optional_positional(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `nargs` and default that make a positional argument optional."""
    return {"nargs": "*" if "nargs" in settings else "?", "default": None}


def _help(text: str, field: dataclasses.Field[Any], flags: Mapping[str, Sequence[str]]) -> str:
    """The help text with the names of flags and the field's default, if it has one."""
    default = None if field.default is dataclasses.MISSING else field.default
    return with_default(with_flags(text, {name: each[-1] for name, each in flags.items()}), default).replace("%", "%%")


def _settings_of(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for the values of a field."""
    settings = _value_settings(hint)
    if field.name == "size" and settings.get("nargs") == 2:
        return {"type": _parse_size, "metavar": "WxH"}
    if settings.get("type") is str:
        settings["metavar"] = placeholder(field.name, "nargs" in settings)
    return settings


def _parse_size(text: str) -> list[int]:
    """Height and width of `768x512` (width x height), or of `512`."""
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 768x512, or one side of a square")
    width, height = sides.group(1), sides.group(2) or sides.group(1)
    return [int(height), int(width)]


def _value_settings(hint: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for values of an annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        several = [a for a in options if typing.get_origin(a) is tuple]
        return _value_settings(several[0] if several else options[0])
    if origin is Literal:
        return {"choices": args, **({"metavar": name} if (name := choices_placeholder(args)) else {})}
    if origin is tuple and _is_mapping(args[0]):
        return {"nargs": "+", "type": _parse_table, "metavar": "KEY=VALUE,…"}
    if origin is tuple:
        return {"nargs": "+" if Ellipsis in args else len(args), **_scalar_settings(args[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if _is_mapping(hint):
        if len(args) > 1 and _is_mapping(args[1]):
            return {"nargs": "+", "type": _parse_options, "metavar": "PATTERN:OPTION=VALUE"}
        return {"nargs": "+", "type": _pair_parser(args[1] if args else str), "metavar": "KEY=VALUE"}
    return _scalar_settings(hint)


def _scalar_settings(hint: Any) -> dict[str, Any]:
    if hint not in METAVARS:
        return {"type": str}
    return {"type": hint, "metavar": METAVARS[hint]}


def _pair_parser(kind: Any) -> Any:
    def parse(text: str) -> tuple[str, Any]:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
        return key, kind(value) if kind in (int, float) else value

    return parse


def _parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """`mlp.*:rank=4,alpha=2` as `("mlp.*", {"rank": 4, "alpha": 2})`. Values are read as JSON where they are JSON."""
    pattern, _, options = text.rpartition(":")
    pairs = [option.partition("=") for option in options.split(",")]
    if not pattern or not all(name and sign for name, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN:OPTION=VALUE[,OPTION=VALUE]")
    return pattern, {name: _literal(value) for name, _, value in pairs}


def _parse_table(text: str) -> dict[str, Any]:
    """`path=toys,repeats=2` as `{"path": "toys", "repeats": 2}`. A part without `=` belongs to the value before it."""
    parts = list[str]()
    for part in text.split(","):
        if re.match(r"\s*[\w-]+=", part):
            parts.append(part.strip())
        elif parts:
            parts[-1] += f",{part}"
        else:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE[,KEY=VALUE]")
    return {name.replace("-", "_"): _literal(value) for name, _, value in (part.partition("=") for part in parts)}


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def values(config: type, namespace: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of `config` in a parsed namespace, converted to the annotated types."""
    start = f"{prefix}." if prefix else ""
    hints = typing.get_type_hints(config)
    names = [f.name for f in dataclasses.fields(config) if namespace.get(start + f.name) is not None]
    return {name: _convert(namespace[start + name], hints[name]) for name in names}


def _convert(value: Any, hint: Any) -> Any:
    """A list of parsed values as the mapping, tuple or single string of the annotated type."""
    if not isinstance(value, list):
        return value
    if typing.get_origin(hint) is not tuple and any(_is_mapping(h) for h in (hint, *typing.get_args(hint))):
        return _merge(value)
    one_or_more = typing.get_origin(hint) in (Union, types.UnionType) and str in typing.get_args(hint)
    return value[0] if len(value) == 1 and one_or_more else tuple(value)


def _merge(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping; options of a repeated pattern are merged."""
    merged: dict[str, Any] = {}
    for key, value in pairs:
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def about_of(config: type) -> str:
    """First paragraph of the class's docstring, in one line."""
    return " ".join((inspect.getdoc(config) or "").partition("\n\n")[0].split())


def help_of(config: type) -> dict[str, str]:
    """Field name to its text in the `Args:` section of the class's docstring, or of the base class that defines the field.

    `name, other: text` describes two fields. An entry starts a line or follows the period of another entry.
    """
    texts: dict[str, str] = {}
    for cls in config.__mro__:
        if dataclasses.is_dataclass(cls):
            texts = {**_argument_texts(cls), **texts}
    return texts


def _argument_texts(config: type) -> dict[str, str]:
    body = (inspect.getdoc(config) or "").partition("Args:\n")[2]
    names = [f.name for f in dataclasses.fields(config)]
    name = rf"(?:{'|'.join(names)})"
    start = re.compile(rf"(?:^ {{4}}|(?<=\.)\s+)`?({name}(?:`?,\s+`?{name})*)`?:\s", re.MULTILINE)
    block = "\n".join(itertools.takewhile(lambda line: not line or line.startswith(" "), body.splitlines()))
    entries = list(start.finditer(block))
    texts: dict[str, str] = {}
    for entry, following in itertools.zip_longest(entries, entries[1:]):
        text = " ".join(block[entry.end() : following.start() if following else len(block)].split()).rstrip(".")
        for name in re.split(r"`?,\s+`?", entry.group(1)):
            texts.setdefault(name, text)
    return texts
