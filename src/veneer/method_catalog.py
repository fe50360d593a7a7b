"""What there is to choose from: every method of the registry in words, and what it trains on well-known models."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from veneer.flags import help_of
from veneer.full_size_models import full_size
from veneer.injection import Method, VeneerError, methods
from veneer.injection.attachment.plan import fits, plan
from veneer.injection.method import Need
from veneer.injection.towers import Tower, towers_of

PACKAGE = "veneer.methods."
PLACES = {
    "WeightSite": "weights of layers",
    "NormSite": "norms",
    "BranchSite": "branches of blocks, such as attention and MLP",
    "StreamSite": "whole blocks",
    "TokenSite": "a row of tokens that others can join",
    "AttentionSite": "attention",
    "ParamSite": "single parameters",
    "VocabularySite": "words of a text encoder",
    "PixelSite": "the picture before the model sees it",
    "FeatureSite": "features of a picture, or scores of classes",
    "PromptSite": "class prompts of a CLIP",
    "ResidualSite": "what a UNet adds between its blocks",
}
"""Kinds of site in words."""
AREAS = {
    "diffusion": ("Stable Diffusion 1.5", "DiT-XL/2"),
    "vision": ("ViT-B/16", "ResNet-50", "CLIP ViT-B/16, 1,000 classes"),
}
"""Models of `full_size.MODELS` that have between them every kind of site of their area."""


@dataclass(frozen=True)
class Option:
    """A field of a method: its name, type and default as text, and its sentence of the docstring."""

    name: str
    type: str
    default: str
    about: str


@dataclass(frozen=True)
class Described:
    """A method in words.

    Args:
        name: in the registry. `source`: the distribution. `kind`: the package that it lies in, or another distribution.
        about: first line of its file. `formula`: of its class. `text`: the whole docstring.
        needs: where it fits. `conditions`: what it is given for each picture. `options`: its fields.
    """

    name: str
    source: str
    kind: str
    about: str
    formula: str
    text: str
    paper: str
    needs: str
    conditions: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Count:
    """What a method trains on a model with its defaults: sites, numbers, and their share of the model's."""

    sites: int
    trained: int
    share: float


def catalogue() -> list[Described]:
    """Every method by name, those of other distributions too; one that cannot be imported tells so in its place."""
    return [_described(name) for name in methods.names()]


def _described(name: str) -> Described:
    source = methods.source(name)
    try:
        method = methods.get(name)
    except (ImportError, VeneerError, AttributeError) as error:
        why = f"It cannot be used: {error}"
        return Described(name, source, source, why, "", why, "", "", (), ())
    text = inspect.getdoc(method) or ""
    title = (inspect.getdoc(sys.modules[method.__module__]) or text).split("\n")[0]
    own = method.__module__.startswith(PACKAGE)
    return Described(
        name=name,
        source=source,
        kind=method.__module__.removeprefix(PACKAGE).partition(".")[0] if own else source,
        about=title,
        formula=text.split("\n")[0],
        text=text,
        paper=getattr(method, "paper", ""),
        needs=" or ".join(dict.fromkeys(map(_need, method.needs))),
        conditions=tuple(method.conditions),
        options=tuple(_options(method)),
    )


def _need(need: Need) -> str:
    words = PLACES.get(need.site.__name__, need.site.__name__)
    if need.where.get("cross"):
        words = "attention to the prompt"
    if need.where.get("grid") is ...:
        words += ", where patches stand in a grid"
    return f"{words} ({', '.join(need.roles)})" if need.roles else words


def _options(method: type[Method]) -> Iterator[Option]:
    hints, words = typing.get_type_hints(method), help_of(method)
    for field in dataclasses.fields(method):
        if field.name != "by_site":
            yield Option(field.name, _type(hints[field.name]), _default(field), words.get(field.name, ""))


def _type(hint: Any) -> str:
    """A type as people write it."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "must be given"


def counts(model: str, told: Callable[[int, int], None] | None = None) -> dict[str, Count | None]:
    """What each method trains on a model of `full_size.MODELS`, by name; None where it does not fit with its defaults.

    Counted once a process: seconds for most models.

    Args:
        told: called with how many methods are done, and of how many.
    Raises:
        VeneerError: there is no such model.
    """
    full_size(model)
    names, found = methods.names(), {}
    for number, name in enumerate(names, 1):
        found[name] = _count(name, model)
        if told is not None:
            told(number, len(names))
    return found


@functools.cache
def _count(name: str, model: str) -> Count | None:
    towers = _towers(model)
    try:
        method = methods.get(name)
        if not any(fits(method, site) for tower in towers for site in tower.sites):
            return None
        made = plan(towers, method(), None, ())
    except (VeneerError, ImportError, AttributeError, TypeError, ValueError):
        return None
    numbers = {id(p): p.numel() for _, adapter in made.parts for p in adapter.parameters() if p.requires_grad}
    trained, whole = sum(numbers.values()), sum(p.numel() for tower in made.towers.values() for p in tower.parameters())
    return Count(len(made.parts), trained, trained / whole)


@functools.cache
def for_models(area: str) -> frozenset[str]:
    """Names of the methods that fit some model of an area, by what the models offer and the methods need.

    Args:
        area: `diffusion` or `vision`.
    """
    sites = [site for model in AREAS[area] for tower in _towers(model) for site in tower.sites]
    return frozenset(name for name in methods.names() if (m := _method(name)) and any(fits(m, site) for site in sites))


def _method(name: str) -> type[Method] | None:
    try:
        return methods.get(name)
    except (ImportError, VeneerError, AttributeError):
        return None


@functools.cache
def _towers(model: str) -> list[Tower]:
    """Of a model, whose sites are looked for once."""
    return towers_of(full_size(model))
