"""Rows of a comparison: methods with their options, as written by the user."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from veneer.injection import methods
from veneer.injection.errors import OptionError

ROW = re.compile(r"\s*([\w+]+)\s*(?:\(([^()]*)\))?\s*")
TYPES = {bool: "True or False", int: "a whole number", float: "a number"}
"""Types of option values that are checked, with their names in messages."""


@dataclass(frozen=True)
class MethodRow:
    """A method in a comparison, one row of the table.

    Args:
        label: the row as written by the user. `method`, `where`: for `TransferConfig`. `options`: of its (first) method.
        scratch: train from random initialization.
    """

    label: str
    method: str
    options: dict[str, dict[str, Any]]
    where: tuple[str, ...] | None = None
    scratch: bool = False


def parse_rows(text: str) -> list[MethodRow]:
    """Parses rows such as `lora, adaptformer(bottleneck=8, scale=0.5), lora(rank=4, where=attn mlp), vpt+lora, scratch`.

    Raises:
        VeneerError: a syntax error, or the same row twice. UnknownName: no such method. TypeError: no such option.
    """
    rows: list[MethodRow] = []
    rest = text
    while rest.strip():
        match = ROW.match(rest)
        if match is None or (rest[match.end() :] and rest[match.end()] != ","):
            message = (
                f"methods: cannot parse {rest!r}; expected a list such as 'lora, adaptformer(bottleneck=8), vpt+lora, full'."
            )
            raise OptionError(message, option="methods", given=rest)
        rows.append(_row(match[0].strip(), match[1], match[2] or ""))
        rest = rest[match.end() + 1 :]
    labels = [row.label for row in rows]
    if len(set(labels)) != len(labels) or not labels:
        message = f"methods: {text!r}; expected different methods, separated by commas."
        raise OptionError(message, option="methods", given=tuple(labels))
    return rows


def with_baseline(text: str, baseline: str) -> str:
    """The rows, with the baseline prepended if it is missing; "" for none."""
    missing = baseline and baseline not in [row.label for row in parse_rows(text)]
    return f"{baseline}, {text}" if missing else text


def _row(label: str, name: str, options: str) -> MethodRow:
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in options.split(","))):
        key, sign, value = part.partition("=")
        if not sign:
            raise OptionError(f"methods: {label!r}: {part!r}; expected key=value.", option="methods", where=label, given=part)
        try:
            given[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            given[key.strip()] = value.strip()
    where = given.pop("where", None)
    scratch, method = name == "scratch", "full" if name == "scratch" else name
    first = method.split("+")[0]
    if method != "zero_shot":
        for each in method.split("+"):
            methods.get(each)
        _check_types(methods.get(first), given, label)
        methods.get(first).from_config(given)
    return MethodRow(label, method, {first: given} if given else {}, tuple(where.split()) if where else None, scratch)


def _check_types(method: type, given: Mapping[str, Any], label: str) -> None:
    """Raises an error if the value of a numeric or boolean option has another type."""
    hints = get_type_hints(method)
    for name, value in given.items():
        kinds = get_args(hints.get(name)) or (hints.get(name),)
        expected = [words for kind, words in TYPES.items() if kind in kinds]
        valid = type(value) in kinds or (float in kinds and type(value) is int) or (value is None and type(None) in kinds)
        if expected and not valid and str not in kinds:
            message = f"methods: {label!r}: {name} is {value!r}; expected {' or '.join(expected)}."
            raise OptionError(message, option=name, where=label, given=value)
