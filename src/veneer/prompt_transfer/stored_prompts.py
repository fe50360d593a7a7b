"""The trained prompts of an adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor, nn

from veneer.formats._core.stored_adapters import read_native
from veneer.formats._io.locations import locate
from veneer.injection import VeneerError
from veneer.injection.attachment.fingerprint import identity

PARAMETERS = ("prompt", "context")
"""Names of the parameters that are prompts: of tokens, and of class prompts."""

SOFT_PROMPTS = ("coop", "prompt_tuning")
"""Methods whose prompts at the input of one tower compute what those of `prompt_tuning` compute."""


class StoredPromptError(VeneerError, ValueError):
    """A file without prompts, or prompts that cannot be compared."""


def read_prompts(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Prompts (tokens, width) of a native file, by site; those of each class one after the other.

    Raises:
        LoadError: the file is of another format or corrupt. StoredPromptError: it has no prompts.
    """
    file = read_native(locate(path))
    prompts = {
        name.rpartition(":")[0]: tensor.flatten(0, -2).float()
        for state in file.states
        for name, tensor in state.items()
        if name.rpartition(":")[2] in PARAMETERS and tensor.ndim > 1
    }
    if not prompts:
        trained = tuple(entry["method"] for entry in file.entries)
        message = f"{file.path}: has no prompts, but {', '.join(trained)}; expected a file of a method such as vpt or coop."
        raise StoredPromptError(message, file=file.path, where="prompts", given=trained, expected=PARAMETERS)
    return prompts


@dataclass(frozen=True)
class SoftPrompt:
    """The soft prompt of a file.

    Args:
        file: path. `vectors`: (tokens, width). `site`: where it is. `where`: selection of the site.
        base: class, config and fingerprint of the model that it was trained on.
    """

    file: str
    vectors: Tensor
    site: str
    where: tuple[str, ...]
    base: Mapping[str, Any]


def read_soft_prompt(path: str | PathLike[str]) -> SoftPrompt:
    """The prompt of a native file with one prompt at the input of a tower, the same for all classes.

    Raises:
        LoadError: the file is of another format or corrupt.
        StoredPromptError: it has no prompt of this kind, or several.
    """
    file = read_native(locate(path))
    found = [
        (entry, name.rpartition(":")[0], tensor)
        for entry, state in zip(file.entries, file.states, strict=True)
        for name, tensor in state.items()
        if entry["method"] in SOFT_PROMPTS and name.rpartition(":")[2] in PARAMETERS
    ]
    shapes = tuple(tuple(tensor.shape) for _, _, tensor in found)
    front = all(entry["config"].get("position", "end") == "end" for entry, _, _ in found)
    if len(found) != 1 or len(shapes[0]) != 2 or not front:
        trained = tuple(entry["method"] for entry in file.entries)
        message = (
            f"{file.path}: has prompts of shapes {shapes} by {', '.join(trained)}; expected one prompt (tokens, width) before "
            f"the names of classes or the patches of an image, of {', '.join(SOFT_PROMPTS)}, such as by --method prompt_tuning."
        )
        raise StoredPromptError(message, file=file.path, where="prompts", given=shapes, expected=SOFT_PROMPTS)
    entry, site, vectors = found[0]
    base = {key: value for key, value in next(iter(file.header["base"].values())).items() if key != "without"}
    return SoftPrompt(str(file.path), vectors.float(), site, tuple(entry["where"]), base)


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Class, config and fingerprint of a model, as in `SoftPrompt.base`."""
    return identity(model)


def check_comparable(first: Mapping[str, Tensor], second: Mapping[str, Tensor], file: str) -> None:
    """Raises `StoredPromptError` if prompts are at other sites or have another width; their numbers of tokens may differ.

    Args:
        file: of the second prompts.
    """
    given, expected = ({site: prompt.shape[-1] for site, prompt in prompts.items()} for prompts in (second, first))
    if given != expected:
        message = f"{file}: prompts are at {_text(given)}; expected {_text(expected)}. Compare prompts of one model and method."
        raise StoredPromptError(message, file=file, where="prompts", given=given, expected=expected)


def _text(widths: Mapping[str, int]) -> str:
    """The first site and its width, and the number of sites."""
    site, width = next(iter(widths.items()))
    return f"{site} of width {width}" + (f" and {len(widths) - 1} more sites" if len(widths) > 1 else "")
