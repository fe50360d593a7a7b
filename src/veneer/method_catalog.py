"""Catalog of the methods in the registry: descriptions, options, and trainable parameters on well-known models."""

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
from veneer.injection.attachment.plan import plan, supports
from veneer.injection.method import Need
from veneer.injection.towers import Tower, towers_of

PACKAGE = "veneer.methods."
SITES = {
    "WeightSite": "weights of layers",
    "NormSite": "normalization layers",
    "BranchSite": "branches of blocks, such as attention and MLP",
    "StreamSite": "whole blocks",
    "TokenSite": "token sequences that accept more tokens",
    "AttentionSite": "attention",
    "SelfAttentionSite": "self-attention of vision and text transformers",
    "ParamSite": "single parameters",
    "VocabularySite": "token embeddings of a text encoder",
    "PixelSite": "the input image",
    "FeatureSite": "image features, or logits",
    "PromptSite": "class prompts of a CLIP",
    "MultimodalPromptSite": "class prompts of a CLIP with a vision transformer",
    "ResidualSite": "skip connections of a UNet",
}
"""Types of sites as phrases."""
AREAS = {
    "diffusion": ("Stable Diffusion 1.5", "DiT-XL/2"),
    "vision": ("ViT-B/16", "ResNet-50", "CLIP ViT-B/16, 1,000 classes"),
}
"""Area to models of `full_size_models.MODELS` that together have every type of site of the area."""


@dataclass(frozen=True)
class Option:
    """A field of a method: its name, its type and default as text, and its text in the docstring."""

    name: str
    type: str
    default: str
    about: str


@dataclass(frozen=True)
class MethodEntry:
    """Description of a method.

    Args:
        name: name in the registry.
        source: the distribution that provides it.
        kind: sub-package of `veneer.methods`, or the distribution.
        about: first line of the module's docstring.
        formula: first line of the class's docstring.
        text: the whole docstring of the class.
        paper: title of the paper.
        needs: sites that it needs, as a phrase.
        conditions: inputs that it is conditioned on.
        options: its fields.
        uses: keys of `method_search.USES`, the main use first. `recommended_for`: those in which it is a good first choice.
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
    uses: tuple[str, ...] = ()
    recommended_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParameterCount:
    """What a method trains on a model with its defaults: sites, trainable parameters, and their share of the model."""

    sites: int
    trainable: int
    share: float


def catalog() -> list[MethodEntry]:
    """Every method by name, also of other distributions. The entry of a method that cannot be imported has the error."""
    return [_entry(name) for name in methods.names()]


def _entry(name: str) -> MethodEntry:
    source = methods.source(name)
    try:
        method = methods.get(name)
    except (ImportError, VeneerError, AttributeError) as error:
        why = f"It cannot be imported: {error}"
        return MethodEntry(name, source, source, why, "", why, "", "", (), ())
    text = inspect.getdoc(method) or ""
    title = (inspect.getdoc(sys.modules[method.__module__]) or text).split("\n")[0]
    in_package = method.__module__.startswith(PACKAGE)
    return MethodEntry(
        name=name,
        source=source,
        kind=method.__module__.removeprefix(PACKAGE).partition(".")[0] if in_package else source,
        about=title,
        formula=text.split("\n")[0],
        text=text,
        paper=getattr(method, "paper", ""),
        needs=" or ".join(dict.fromkeys(map(_needed_site, method.needs))),
        conditions=tuple(method.conditions),
        options=tuple(_options(method)),
        uses=tuple(method.uses),
        recommended_for=tuple(method.recommended_for),
    )


def _needed_site(need: Need) -> str:
    phrase = SITES.get(need.site.__name__, need.site.__name__)
    if need.where.get("cross"):
        phrase = "cross-attention"
    if need.where.get("grid") is ...:
        phrase += " with patches in a grid"
    return f"{phrase} ({', '.join(need.roles)})" if need.roles else phrase


def _options(method: type[Method]) -> Iterator[Option]:
    hints, texts = typing.get_type_hints(method), help_of(method)
    for field in dataclasses.fields(method):
        if field.name != "by_site":
            yield Option(field.name, _type(hints[field.name]), _default(field), texts.get(field.name, ""))


def _type(hint: Any) -> str:
    """A type as it is written in code."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def count_parameters(model: str, progress: Callable[[int, int], None] | None = None) -> dict[str, ParameterCount | None]:
    """Method name to what it trains on a model with its defaults; None if the model does not support it.

    Results are cached per process. The first call takes seconds for most models.

    Args:
        model: name of one of `full_size_models.MODELS`.
        progress: called with the number of counted methods and the number of all methods.
    Raises:
        VeneerError: no model has this name.
    """
    full_size(model)
    names, counts = methods.names(), {}
    for number, name in enumerate(names, 1):
        counts[name] = _count(name, model)
        if progress is not None:
            progress(number, len(names))
    return counts


@functools.cache
def _count(name: str, model: str) -> ParameterCount | None:
    towers = _towers(model)
    try:
        method = methods.get(name)
        if not any(supports(method, site) for tower in towers for site in tower.sites):
            return None
        attachment_plan = plan(towers, method(), None, ())
    except (VeneerError, ImportError, AttributeError, TypeError, ValueError):
        return None
    sizes = {id(p): p.numel() for _, adapter in attachment_plan.parts for p in adapter.parameters() if p.requires_grad}
    trainable = sum(sizes.values())
    total = sum(p.numel() for tower in attachment_plan.towers.values() for p in tower.parameters())
    return ParameterCount(len(attachment_plan.parts), trainable, trainable / total)


@functools.cache
def methods_for(area: str) -> frozenset[str]:
    """Names of the methods that a model of an area supports, by the method's needs and the model's sites.

    Args:
        area: `diffusion` or `vision`.
    """
    sites = [site for model in AREAS[area] for tower in _towers(model) for site in tower.sites]
    return frozenset(name for name in methods.names() if (m := _method(name)) and any(supports(m, site) for site in sites))


def _method(name: str) -> type[Method] | None:
    try:
        return methods.get(name)
    except (ImportError, VeneerError, AttributeError):
        return None


@functools.cache
def _towers(model: str) -> list[Tower]:
    return towers_of(full_size(model))
