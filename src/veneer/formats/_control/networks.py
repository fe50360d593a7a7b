"""What the formats of networks that guide a UNet share: one attachment a file, compared with the model before it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import AttentionSite, ResidualSite
from veneer.injection.towers import Tower, towers_of

from .._core.families import TEXT_WIDTHS, family_of
from .._core.format import Layer, Options, listed
from .._core.lora_config import NATIVE, refuse_trained
from .._io.reader import File

Shape = tuple[int, ...]
ROOM = 2**20  # numbers that a file may lack without being called damaged, beside three times as many as it has
MOST = 64  # layers or blocks of one kind that are counted in a file


class Fit(NamedTuple):
    """What of a file has a place: own name to key. `unused`: keys without one."""

    keys: dict[str, str]
    unused: list[str]


def unet_of(model: Any, file: File, what: str) -> tuple[Tower, ResidualSite]:
    """The tower that takes control, and its site.

    Raises:
        LoadError: there is none.
    """
    towers = towers_of(model)
    for tower in towers:
        for site in tower.sites:
            if isinstance(site, ResidualSite):
                return tower, site
    has = ", ".join(type(t.module).__name__ for t in towers)
    message = f"{file.path}: {what} is for a UNet2DConditionModel, and there are {has}."
    given = tuple(type(t.module).__name__ for t in towers)
    raise LoadError(message, file=file.path, given=given, expected="UNet2DConditionModel")


def side(file: File, key: str, dim: int, dims: int) -> int:
    """Length of one dimension of a tensor.

    Raises:
        LoadError: there is no such tensor, or it has another number of dimensions than `dims`.
    """
    shape = file.shapes.get(key)
    if shape is None or len(shape) != dims:
        got = "is missing" if shape is None else f"has the shape {shape}"
        message = f"{file.path}: '{key}' {got}; expected {dims} dimensions. It is damaged, or holds something else."
        raise LoadError(message, file=file.path, where=key, given=shape, expected=dims)
    return shape[dim]


def few(file: File, count: int, what: str) -> int:
    """`count`, if a network can have so many.

    Raises:
        LoadError: it is more than `MOST`.
    """
    if count > MOST:
        message = f"{file.path}: {count:,} {what}; at most {MOST} are read. It is damaged."
        raise LoadError(message, file=file.path, where=what, given=count, expected=MOST)
    return count


def drafted(file: File, build: Callable[[], nn.Module | None]) -> nn.Module:
    """What would be built, without values.

    Raises:
        LoadError: it cannot be built for the model, or with such options.
    """
    try:
        with torch.device("meta"):
            return build() or nn.Module()
    except LoadError as error:
        raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
    except ValueError as error:
        raise LoadError.from_error(error, f"{file.path}: it does not fit the model: {error}.", file=file.path) from error


def shapes(module: nn.Module) -> dict[str, Shape]:
    """Shape of each saved tensor."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def fit(file: File, expected: Mapping[str, Shape], names: Mapping[str, str], tower: Tower, options: Options, form: str) -> Fit:
    """Compare a file with what the model needs.

    Args:
        expected: own name to shape. `names`: own name to the key that the file's layout has for it.
        form: name of the format.
    Raises:
        LoadError: strict, and a tensor is missing, unused or misshapen; or the file holds next to nothing of it.
    """
    keys = {own: key for own, key in names.items() if own in expected and key in file.shapes}
    known = set(keys.values())
    unused = [key for key in file.shapes if key not in known]
    missing = [names[own] for own in expected if own not in keys]
    misshapen = {key: (file.shapes[key], expected[own]) for own, key in keys.items() if file.shapes[key] != expected[own]}
    wrong = [f"{key} {given} for {right}" for key, (given, right) in misshapen.items()]
    told = [f"{word} {len(n)}: {_few(n)}" for word, n in (("missing", missing), ("unused", unused), ("misshapen", wrong)) if n]
    lacks = sum(map(math.prod, expected.values())) > 4 * sum(math.prod(file.shapes[key]) for key in known) + ROOM
    if told and (options.strict or lacks or len(wrong) == len(keys)):
        advice = "" if lacks or not options.strict else " Pass strict=False to load what fits."
        raise LoadError(
            f"{file.path}: it does not fit the model. {'; '.join(told)}.{_families(file, form, tower)}{advice}",
            file=file.path,
            missing=missing,
            unused=unused,
            misshapen=misshapen,
            family=family_of(file.shapes, form) or "",
        )
    return Fit(keys, unused)


def network(description: str) -> str:
    """The name of a network, without its article and what is said of it after a comma."""
    return re.sub("^an? ", "", description.partition(",")[0])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _families(file: File, form: str, tower: Tower) -> str:
    """Sentences that say what the file is for and what the model is, where widths tell."""
    family = family_of(file.shapes, form)
    widths = {site.context_width for site in tower.sites if isinstance(site, AttentionSite) and site.cross}
    own = [name for width, name in TEXT_WIDTHS.items() if widths == {width}]
    told = f" It is for {family}." if family else ""
    return told + (f" The model reads texts of {widths.pop()} numbers a token, as {own[0]} does." if told and own else "")


def single(attachments: Attachment | Sequence[Attachment], target: Path, method: str, files: str) -> Attachment:
    """The one attachment that a file holds, without trained parameters of the base.

    Args:
        files: what the format is called in errors.
    Raises:
        SaveError: there are several or none, of another method, or with trained parameters of the base.
    """
    attachment = only(attachments, target, method, files)
    refuse_trained(attachment, target, files)
    return attachment


def only(attachments: Attachment | Sequence[Attachment], target: Path, method: str, files: str) -> Attachment:
    """The one attachment that is to be saved.

    Raises:
        SaveError: there are several or none, or it is of another method.
    """
    several = listed(attachments)
    if len(several) != 1:
        message = f"{target}: {files} hold one attachment, got {len(several)}. Save each by itself."
        raise SaveError(message, file=target, given=len(several), expected=1)
    attachment = several[0]
    if attachment.method.name != method:
        message = f"{target}: '{attachment.name}' is {attachment.method.name}; {files} hold {method}. {NATIVE}"
        raise SaveError(message, file=target, where=attachment.name, given=attachment.method.name, expected=method)
    return attachment


def parts(file: File, method: str, part: Callable[[str], str]) -> list[Layer]:
    """A layer for each module of a file, by the part of the network that it is in.

    Args:
        part: from a module's name to the part's.
    """
    found: dict[str, list[str]] = {}
    for key in file.shapes:
        found.setdefault(key.rpartition(".")[0] or key, []).append(key)
    return [Layer(part(name), method, values=sum(math.prod(file.shapes[k]) for k in keys)) for name, keys in found.items()]
