"""Initial prompt of a task from the prompts of other tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.formats._core.stored_adapters import StoredFile, read_native, write_native
from veneer.formats._io.locations import locate
from veneer.formats._io.writer import destination

from .stored_prompts import PARAMETERS, StoredPromptError

FILE = "adapter.safetensors"


@dataclass(frozen=True)
class LibraryPrompt:
    """The prompts of a file, all by one method.

    Args:
        path: of the file. `entry`: of the method in the header. `header`: of the file. `state`: tensor by `site:parameter`.
    """

    path: str
    entry: Mapping[str, Any]
    header: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def prompts(self) -> dict[str, Tensor]:
        """(tokens, width) by site, as of `read_prompts`."""
        return {name.rpartition(":")[0]: tensor.flatten(0, -2).float() for name, tensor in self.state.items()}

    @property
    def layout(self) -> dict[str, Any]:
        """What prompts that are averaged have in common: method, model, and shapes."""
        base = {key: dict(each) for key, each in self.header["base"].items()}
        fingerprints = {key: each.get("fingerprint") for key, each in base.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        return {"method": self.entry["method"], "model": fingerprints, "shapes": shapes}


def read_library(paths: Sequence[str | PathLike[str]]) -> list[LibraryPrompt]:
    """Prompts of one method and model, of several native files; other adapters of the files, such as a head, are left out.

    Raises:
        LoadError: a file is of another format or corrupt.
        StoredPromptError: a file has no prompts, has parameters besides prompts, or differs from the first.
    """
    library = [_read(read_native(locate(path))) for path in paths]
    for other in library[1:]:
        for name, expected in library[0].layout.items():
            if (given := other.layout[name]) != expected:
                message = f"{other.path}: its {name} differs from that of {library[0].path}: {given} instead of {expected}."
                raise StoredPromptError(message, file=other.path, where=name, given=given, expected=expected)
    return library


def _read(file: StoredFile) -> LibraryPrompt:
    found = [
        (entry, state)
        for entry, state in zip(file.entries, file.states, strict=True)
        if any(name.rpartition(":")[2] in PARAMETERS for name in state)
    ]
    if len(found) != 1 or any(name.rpartition(":")[2] not in PARAMETERS or t.ndim < 2 for name, t in found[0][1].items()):
        trained = tuple(entry["method"] for entry in file.entries)
        message = (
            f"{file.path}: has {', '.join(trained)}; expected one method with prompts and no other parameters: vpt without "
            "projection, coop or prompt_tuning."
        )
        raise StoredPromptError(message, file=file.path, where="prompts", given=trained, expected=PARAMETERS)
    return LibraryPrompt(file.path, *found[0][:1], file.header, found[0][1])


def average_prompts(library: Sequence[LibraryPrompt], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ_i α_i P_i / Σ_i α_i of the tensors of prompts with the same shapes.

    Args:
        weights: α_i, whose sum is not 0.
    Source: Vu et al., SPoT, ACL 2022, section 4, "top-k weighted average".
    """
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum()
    states = [each.state for each in library]
    return {
        name: sum(float(w) * state[name].double() for w, state in zip(share, states, strict=True)).to(tensor.dtype)  # type: ignore[union-attr]
        for name, tensor in states[0].items()
    }


def write_prompt(folder: Path, like: LibraryPrompt, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Path:
    """Writes prompts as an adapter of the method and model of a library, without a head."""
    header = {key: value for key, value in like.header.items() if key not in ("attachments", "composition")}
    path = destination(folder, FILE)
    return write_native(path, {**header, "provenance": dict(provenance)}, [like.entry], [state])
