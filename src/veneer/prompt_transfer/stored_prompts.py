"""The trained prompts of an adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from torch import Tensor

from veneer.formats._core.stored_adapters import read_native
from veneer.formats._io.locations import locate
from veneer.injection import VeneerError

PARAMETERS = ("prompt", "context")
"""Names of the parameters that are prompts: of tokens, and of class prompts."""


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
