"""Methods that the forms train, and for the others the reason and the command."""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from pathlib import Path

from veneer.base_models.loading import find
from veneer.classification.models.compatibility import compatible_methods, methods_with_sites
from veneer.injection import Method, OptionError, methods
from veneer.listing import method_hosts
from veneer.training.attach_methods import MODELS, trainable_methods

from ...base_access import check_access
from ...workspace import printable

CLASSIFIERS = ("bundled", "bundled_clip")
"""Classifiers whose sites are compared with the methods; those of others are not loaded for it."""
DENOISERS = {"unet": "diffusers_unet", "transformer": "diffusers_dit"}
"""Component of a pipeline to its host."""

ELSEWHERE = {"pez": "for a prompt that describes photos use veneer personalize PHOTOS --method pez"}
"""Method to its command for photos that is no form."""


def reason_not_offered(method: type[Method]) -> str:
    """Why no form can train a method, with the command that can; empty if a form can."""
    name = method.name
    if method.needs_tasks:
        return f"it needs several tasks, and a form has one: veneer transfer DATA1 DATA2 … --tasks --method {name}"
    if method.needs_unlabeled:
        command = f"veneer transfer DATA --unlabeled FOLDER --method {name}"
        return f"it needs images without labels, for which there is no field: {command}"
    if any(field.name == "adapters" for field in fields(method)):
        flag = f"--{name.replace('_', '-')}.adapters"
        return f"it combines files of trained adapters: veneer transfer DATA --method {name} {flag} FILE1 FILE2"
    return ""


def offered(names: list[str] | tuple[str, ...]) -> list[str]:
    """The methods that a form can train."""
    return [name for name in names if name == "zero_shot" or not reason_not_offered(methods.get(name))]


def classifier_methods(model: str) -> list[str]:
    """Methods of the page Classify for a model, and `zero_shot` for a CLIP.

    Args:
        model: as in `TransferConfig`. The sites of a bundled model are known; for others the kind of the model decides.
    """
    names = offered(compatible_methods(model))
    return [name for name in names if name in methods_with_sites(model)] if model in CLASSIFIERS else names


def photo_methods(base: str) -> list[str]:
    """Methods of the page Train for a base model.

    Raises:
        VeneerError: no such base model, or one that visitors may not name.
    """
    return offered(trainable_methods(_hosts(base)))


def check_photo_method(name: str, base: str) -> None:
    """Checks that the page Train can train a method on a base model.

    Raises:
        OptionError: it cannot. UnknownName: no such method.
    """
    method = methods.get(name)
    if reason := reason_not_offered(method):
        raise OptionError(f"{name} is not available here: {reason}.", option="method", given=name, expected="another method")
    if name not in trainable_methods(MODELS):
        places = pages_of(name)
        where = f"use the page {places[0]}" if places else "choose another"
        if name == "pez":
            where = "the page Classify trains it with a CLIP; for photos: veneer personalize PHOTOS --method pez"
        raise OptionError(
            f"{name} trains no diffusion model; {where}.", option="method", given=name, expected="a method of the list"
        )
    if name not in trainable_methods(_hosts(base)):
        message = f"{name} has no sites in the base model {printable(base)}; choose a method of the list, or another base model."
        raise OptionError(message, option="method", where=base, given=name, expected="a method of the list")


def _place(name: str) -> str:
    """The page that trains a method, as advice."""
    return f"use the page {pages_of(name)[0]}" if pages_of(name) else "choose a method of the list"


def _hosts(base: str) -> tuple[str, ...]:
    """Hosts of the models of a pipeline; all for one that is not in a local folder."""
    folder = find(check_access(base))
    index = folder / "model_index.json" if isinstance(folder, Path) else None
    if index is None or not index.is_file():
        return MODELS
    parts = json.loads(index.read_text(encoding="utf-8"))
    return (*(host for part, host in DENOISERS.items() if part in parts), "clip_text")


def pages_of(name: str) -> tuple[str, ...]:
    """Pages that train a method, by the support matrix; empty if none does, or for a method of another package."""
    method, hosts = methods.get(name), _supported_hosts().get(name, frozenset())
    if reason_not_offered(method):
        return ()
    if method.conditions:
        return ("Control",)
    photos = hosts & {*MODELS} and not (method.prepares or method.keeps_head)
    images = hosts - {*MODELS, "clip_classifier", "open_clip"}
    places = [("Train", photos), ("Classify", images), ("Classify, with a CLIP", not images and "clip_classifier" in hosts)]
    return tuple(place for place, trains in places if trains)


@functools.cache
def _supported_hosts() -> dict[str, frozenset[str]]:
    return {name: frozenset(h for h, cell in cells.items() if cell != "–") for name, cells in method_hosts().items()}
