"""Projector of the soft prompts of one model to those of another."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.formats._io.reader import read
from veneer.formats._io.writer import destination, write
from veneer.injection import LoadError, OptionError

KEY = "veneer_prompt_projector"
"""Metadata key of the options of a projector in its file."""
FILE = "projector.safetensors"
OPTIONS = ("tokens", "source_width", "target_width", "hidden", "by_token")


class PromptProjector(nn.Module):
    """P_t = W_2 LeakyReLU(W_1 vec(P_s) + b_1) + b_2: prompts P_s (p, d_s) of one model to prompts P_t (p, d_t) of another.

    Args:
        tokens: p, at least 1. `source_width`, `target_width`: d_s and d_t. `hidden`: rows of W_1, at least 1.
        by_token: each token is projected alone, by W_1 (hidden, d_s) and W_2 (d_t, hidden), so that p may differ.
    Raises:
        OptionError: a size below 1.
    Source: Su et al., On Transferability of Prompt Tuning for Natural Language Processing, NAACL 2022, cross-model transfer, and
    `CrossModelProjector` of the authors' code (hidden 768, LeakyReLU of slope 0.01, vec of all tokens). Deviation: without the
    layer norm of the prompt that some of the authors' runs have.
    """

    def __init__(self, tokens: int, source_width: int, target_width: int, hidden: int = 768, by_token: bool = False) -> None:
        super().__init__()
        self.options = {
            "tokens": tokens, "source_width": source_width, "target_width": target_width, "hidden": hidden, "by_token": by_token,
        }  # fmt: skip
        for name, value in self.options.items():
            if name != "by_token" and value < 1:
                raise OptionError(f"{name} is {value}; expected at least 1.", option=name, given=value, expected=1)
        factor = 1 if by_token else tokens
        self.first, self.second = nn.Linear(factor * source_width, hidden), nn.Linear(hidden, factor * target_width)

    def forward(self, prompt: Tensor) -> Tensor:
        """(p, d_s) to (p, d_t).

        Raises:
            OptionError: a prompt of another shape.
        """
        tokens, width, by_token = (self.options[name] for name in ("tokens", "source_width", "by_token"))
        expected = (len(prompt) if by_token else tokens, width)
        if tuple(prompt.shape) != expected:
            message = f"the prompt has shape {tuple(prompt.shape)}; the projector is for {expected} (tokens, width)."
            raise OptionError(message, option="prompt", given=tuple(prompt.shape), expected=expected)
        inputs = prompt if by_token else prompt.flatten()
        projected: Tensor = self.second(nn.functional.leaky_relu(self.first(inputs)))
        return projected.reshape(len(prompt), -1)

    def save(self, path: str | PathLike[str], models: dict[str, Any] | None = None) -> Path:
        """Writes a safetensors file.

        Args:
            path: file, or folder for `projector.safetensors`. `models`: JSON values that identify the two models.
        """
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return write(destination(path, FILE), tensors, {KEY: json.dumps({**self.options, "models": models or {}})})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> tuple[PromptProjector, dict[str, Any]]:
        """Reads a file of `save`: the projector, and the values that identify its models.

        Raises:
            LoadError: the file is no projector, or corrupt.
        """
        path = Path(path)
        file = read(path / FILE if path.is_dir() else path)
        header = file.json(KEY) if KEY in file.metadata else None
        if header is None or not _is_complete(header):
            message = f"{file.path}: is no projector of prompts; expected a {FILE} of veneer prompts transfer."
            raise LoadError(message, file=file.path, where=KEY, expected=OPTIONS)
        with torch.device("meta"):
            projector = cls(**{name: header[name] for name in OPTIONS})
        shapes = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
        if shapes != dict(file.shapes):
            message = f"{file.path}: its tensors are not those of its options; the file is corrupt."
            raise LoadError(message, file=file.path, where="tensors", given=dict(file.shapes), expected=shapes)
        projector.load_state_dict({name: tensor.clone() for name, tensor in file.tensors().items()}, assign=True)
        return projector, header["models"]


def squared_distance(projected: Tensor, target: Tensor) -> Tensor:
    """‖P − P_t‖² of two prompts (p, d_t).

    Source: Su et al., NAACL 2022, "distance minimizing".
    """
    return (projected - target).square().sum()


def _is_complete(header: Any) -> bool:
    """True for a header with all options, of their types, and the models."""
    if not isinstance(header, dict) or not isinstance(header.get("models"), dict):
        return False
    sizes = [header.get(name) for name in OPTIONS[:-1]]
    return type(header.get("by_token")) is bool and all(type(size) is int and size >= 1 for size in sizes)
