"""Methods of a search: their options, and the option that sets the size of an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.injection.method import Method

from ..train.method_rows import MethodRow, parse_rows

SIZE_OPTIONS = ("rank", "bottleneck", "tokens")
"""Names of options that set the size of an adapter, the first that a method has."""


@dataclass(frozen=True)
class SearchMethod:
    """A method of a search.

    Args:
        name: of the method. `options`: the other options.
        where: selection of its sites, or None for the method's default.
        size_option: option that sets the size, or None for a method without one, which a block has or has not.
        sizes: sizes to choose from, ascending; (1,) without a size option.
    """

    name: str
    options: Mapping[str, Any]
    where: tuple[str, ...] | None
    size_option: str | None
    sizes: tuple[int, ...]

    def options_of(self, size: int) -> dict[str, Any]:
        """Options that set a size."""
        return {self.size_option: size} if self.size_option else {}

    def build(self, size: int) -> Method:
        """The method's config with a size."""
        return methods.get(self.name).from_config({**self.options, **self.options_of(size)})

    @property
    def learning_rate(self) -> float:
        """The method's default learning rate."""
        return float(methods.get(self.name).learning_rate)

    @property
    def is_scalable(self) -> bool:
        """True if the size may be any number."""
        return self.size_option is not None and self.size_option not in self.options


def parse_methods(text: str, sizes: Sequence[int]) -> tuple[SearchMethod, ...]:
    """Parses methods such as `lora, adaptformer(scale=0.5), vpt(tokens=4)`. A size among the options is the only one.

    Args:
        sizes: of methods whose options do not set one.
    Raises:
        OptionError: a syntax error, the same method twice, joined methods, or a method that trains the head or all weights.
        UnknownName: no such method. UnknownOption: no such option.
    """
    parsed = tuple(_search_method(row, sizes) for row in parse_rows(text))
    names = tuple(method.name for method in parsed)
    if len(set(names)) < len(names):
        message = f"methods: {', '.join(names)}; expected different methods. --sizes sets the sizes to choose from."
        raise OptionError(message, option="methods", given=names, expected=tuple(dict.fromkeys(names)))
    return parsed


def _search_method(row: MethodRow, sizes: Sequence[int]) -> SearchMethod:
    if row.scratch or "+" in row.method or row.method in ("full", "linear_probe", "zero_shot"):
        message = (
            f"methods: {row.label!r} cannot be one of several methods of a block; expected single methods with adapters, such as "
            "'lora, adaptformer, vpt'."
        )
        raise OptionError(message, option="methods", given=row.label, expected="single methods with adapters")
    fields = {field.name: field.default for field in dataclasses.fields(methods.get(row.method))}
    size_option = next((name for name in SIZE_OPTIONS if type(fields.get(name)) is int), None)
    options = row.options.get(row.method, {})
    chosen = (options[size_option],) if size_option in options else tuple(sizes) if size_option else (1,)
    return SearchMethod(row.method, options, row.where, size_option, chosen)
