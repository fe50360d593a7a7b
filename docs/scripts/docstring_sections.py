"""Extension of griffe (mkdocstrings): reads sections that follow each other directly, and several entries on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from griffe import Class, Extension, Function, Module, Object

ATTRIBUTES = re.compile(r"^(?:Class attributes|Attributes, .*):\n", re.MULTILINE)
"""Headings of attributes that griffe does not know."""
SECTION = re.compile(r"(?<=[^\n])\n(?=(?:Args|Attributes|Returns|Raises|Yields):\n)")
"""The end of the line before a section; griffe expects a blank line."""
ENTRIES = re.compile(r"^(?:Args|Attributes|Raises):\n(?: +.*\n?)+", re.MULTILINE)
NEXT_ERROR = re.compile(r"(?<=\.)\s+(?=[A-Z][a-z]+[A-Z]\w*: )")
"""Before a further error: `LoadError: it does not match. StateError: it is merged.`"""

SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
"""An entry for several attributes, which griffe knows of parameters only."""


class DocstringSections(Extension):
    """Rewrites the docstrings of a package before they are parsed."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Visits every object once the package is loaded, when the members of all classes are known."""
        _visit(pkg)


def _visit(obj: Object) -> None:
    if obj.docstring:
        obj.docstring.value = separated(obj.docstring.value, _names(obj))
    for member in obj.members.values():
        if isinstance(member, Class | Function | Module):
            _visit(member)


def _names(obj: Object) -> list[str]:
    """Parameters of a function; members of a class, and parameters of its constructor."""
    if isinstance(obj, Function):
        return [parameter.name for parameter in obj.parameters]
    constructor = obj.members.get("__init__")
    return [*obj.members, *(_names(constructor) if isinstance(constructor, Function) else ())]


def separated(docstring: str, names: Iterable[str]) -> str:
    """A docstring with a blank line before each section, and one entry of a section on a line.

    Args:
        docstring: without indentation.
        names: the parameters or attributes, which may have entries.
    """
    name = "|".join(map(re.escape, names)) or r"(?!)"
    entry = re.compile(rf"(?<=\.)\s+`?((?:{name})(?:`?, `?(?:{name}))*)`?: ")

    def one_a_line(section: re.Match[str]) -> str:
        text = entry.sub(lambda found: f"\n    {found[1].replace('`', '')}: ", section[0])
        if text.startswith("Attributes:"):
            text = SEVERAL.sub(lambda found: "\n".join(f"    {each}: {found[2]}" for each in found[1].split(", ")), text)
        return NEXT_ERROR.sub("\n    ", text)

    return ENTRIES.sub(one_a_line, SECTION.sub("\n\n", ATTRIBUTES.sub("Attributes:\n", docstring)))
