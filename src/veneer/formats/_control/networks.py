"""Parts shared by the formats of control networks: one attachment per file, checked against the model before it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.attention_sites import AttentionSite
from veneer.injection.sites import ResidualSite
from veneer.injection.towers import Tower, towers_of

from .._core.families import TEXT_WIDTHS, family_of
from .._core.format import LayerInfo, Options
from .._core.lora_config import NATIVE, reject_trained_base
from .._io.reader import File

Shape = tuple[int, ...]
MISSING_TOLERANCE = 2**20  # parameters; a file with a quarter of the parameters or less, and this many more missing, is rejected
MAX_LAYERS = 64  # maximum number of layers or blocks of one kind in a file


class KeyMatch(NamedTuple):
    """Match between a file and a network: own parameter name -> key. `unused`: keys that match no parameter."""

    keys: dict[str, str]
    unused: list[str]


def unet_of(model: Any, file: File, what: str) -> tuple[Tower, ResidualSite]:
    """The tower that accepts control residuals, and its site.

    Raises:
        LoadError: the model has none.
    """
    towers = towers_of(model)
    for tower in towers:
        for site in tower.sites:
            if isinstance(site, ResidualSite):
                return tower, site
    has = ", ".join(type(t.module).__name__ for t in towers)
    message = f"{file.path}: {what} needs a UNet2DConditionModel; the model has {has}."
    classes = tuple(type(t.module).__name__ for t in towers)
    raise LoadError(message, file=file.path, given=classes, expected="UNet2DConditionModel")


def dimension(file: File, key: str, dim: int, dims: int) -> int:
    """Size of one dimension of a tensor.

    Raises:
        LoadError: there is no such tensor, or it does not have `dims` dimensions.
    """
    shape = file.shapes.get(key)
    if shape is None or len(shape) != dims:
        got = "is missing" if shape is None else f"has the shape {shape}"
        message = f"{file.path}: '{key}' {got}; expected {dims} dimensions. The file is corrupt or of another kind."
        raise LoadError(message, file=file.path, where=key, given=shape, expected=dims)
    return shape[dim]


def check_count(file: File, count: int, what: str) -> int:
    """`count`, if it is at most `MAX_LAYERS`.

    Raises:
        LoadError: it is more than `MAX_LAYERS`.
    """
    if count > MAX_LAYERS:
        message = f"{file.path}: {count:,} {what}; at most {MAX_LAYERS} are supported. The file is corrupt."
        raise LoadError(message, file=file.path, where=what, given=count, expected=MAX_LAYERS)
    return count


def build_on_meta(file: File, build: Callable[[], nn.Module | None]) -> nn.Module:
    """Builds a module on the meta device.

    Raises:
        LoadError: it cannot be built for the model or with these options.
    """
    try:
        with torch.device("meta"):
            return build() or nn.Module()
    except LoadError as error:
        raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
    except ValueError as error:
        raise LoadError.from_error(error, f"{file.path}: incompatible with the model: {error}.", file=file.path) from error


def shapes(module: nn.Module) -> dict[str, Shape]:
    """Shape of each saved tensor."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def match_tensors(
    file: File, expected: Mapping[str, Shape], names: Mapping[str, str], tower: Tower, options: Options, form: str
) -> KeyMatch:
    """Compares a file with the parameters of a network.

    Args:
        expected: own name -> shape. `names`: own name -> key in the file's layout.
        form: name of the format.
    Raises:
        LoadError: a tensor is missing, unused or of another shape and `strict` is set; or most of the parameters are missing.
    """
    keys = {own: key for own, key in names.items() if own in expected and key in file.shapes}
    known = set(keys.values())
    unused = [key for key in file.shapes if key not in known]
    missing = [names[own] for own in expected if own not in keys]
    misshapen = {key: (file.shapes[key], expected[own]) for own, key in keys.items() if file.shapes[key] != expected[own]}
    wrong = [f"{key} {given} for {right}" for key, (given, right) in misshapen.items()]
    problems = [
        f"{word} {len(n)}: {_shorten(n)}" for word, n in (("missing", missing), ("unused", unused), ("misshapen", wrong)) if n
    ]
    lacks = sum(map(math.prod, expected.values())) > 4 * sum(math.prod(file.shapes[key]) for key in known) + MISSING_TOLERANCE
    if problems and (options.strict or lacks or len(wrong) == len(keys)):
        advice = "" if lacks or not options.strict else " Pass strict=False to load the matching tensors only."
        raise LoadError(
            f"{file.path}: incompatible with the model. {'; '.join(problems)}.{_family_sentences(file, form, tower)}{advice}",
            file=file.path,
            missing=missing,
            unused=unused,
            misshapen=misshapen,
            family=family_of(file.shapes, form) or "",
        )
    return KeyMatch(keys, unused)


def network_name(description: str) -> str:
    """Name of a network: its description without the article and without anything after a comma."""
    return re.sub("^an? ", "", description.partition(",")[0])


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _family_sentences(file: File, form: str, tower: Tower) -> str:
    """Sentences that name the base model family of the file and of the model, where layer widths identify them."""
    family = family_of(file.shapes, form)
    widths = {site.context_width for site in tower.sites if isinstance(site, AttentionSite) and site.cross}
    own = [name for width, name in TEXT_WIDTHS.items() if widths == {width}]
    sentence = f" It is for {family}." if family else ""
    return sentence + (f" The model's text embeddings have width {widths.pop()}, as in {own[0]}." if sentence and own else "")


def single_attachment(attachments: Sequence[Attachment], target: Path, method: str, files: str) -> Attachment:
    """The single attachment to save, without trained base parameters.

    Args:
        files: plural name of the format's files, for error messages.
    Raises:
        SaveError: not exactly one attachment, of another method, or with trained base parameters.
    """
    attachment = only_attachment(attachments, target, method, files)
    reject_trained_base(attachment, target, files)
    return attachment


def only_attachment(attachments: Sequence[Attachment], target: Path, method: str, files: str) -> Attachment:
    """The single attachment to save.

    Raises:
        SaveError: not exactly one attachment, or of another method.
    """
    if len(attachments) != 1:
        message = f"{target}: {files} hold one attachment; got {len(attachments)}. Save each one separately."
        raise SaveError(message, file=target, given=len(attachments), expected=1)
    attachment = attachments[0]
    if attachment.method.name != method:
        message = f"{target}: '{attachment.name}' uses {attachment.method.name}, but {files} hold {method}. {NATIVE}"
        raise SaveError(message, file=target, where=attachment.name, given=attachment.method.name, expected=method)
    return attachment


def layers_by_part(file: File, method: str, part: Callable[[str], str]) -> list[LayerInfo]:
    """One layer for each module of a file, named by the part of the network that contains it.

    Args:
        part: maps a module name to the name of its part.
    """
    found: dict[str, list[str]] = {}
    for key in file.shapes:
        found.setdefault(key.rpartition(".")[0] or key, []).append(key)
    return [LayerInfo(part(name), method, values=sum(math.prod(file.shapes[k]) for k in keys)) for name, keys in found.items()]
