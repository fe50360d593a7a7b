"""A model's folder as diffusers' `save_pretrained` writes it: `diffusion_pytorch_model.safetensors` with `config.json` beside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.injection import LoadError

from .._io.reader import SUFFIX, File, from_json
from .._io.writer import write, write_text

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
STEM = "diffusion_pytorch_model"  # a variant's name follows, such as .fp16
LARGEST = 1_000_000  # bytes of a config


def config_beside(file: File, kind: str) -> dict[str, Any]:
    """The config in the folder of a model; nothing for a file by itself.

    Args:
        kind: the class that it should be of.
    Raises:
        LoadError: it is no file, no JSON object, or of another class.
    """
    path = file.path.with_name(CONFIG)
    if not file.path.name.startswith(STEM) or not os.path.lexists(path):
        return {}
    if not path.is_file():
        message = f"{path}: no ordinary file, but a folder, a device or a link to nothing. Copy it again, or take it away."
        raise LoadError(message, file=path, expected="file")
    try:
        with open(path, "rb") as opened:
            text = opened.read(LARGEST + 1).decode()
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: it is not JSON ({error}). It is damaged.", file=path, expected="JSON") from error
    config = from_json(text, f"{path}: it", LARGEST, file=path)
    if not isinstance(config, dict):
        raise LoadError(f"{path}: it is no JSON object. It is damaged.", file=path, expected="JSON object")
    named = config.get("_class_name", kind)
    if named != kind:
        message = f"{path}: it is a {str(named)[:80]}, another network than {kind}. Load it with its own library."
        raise LoadError(message, file=path, where="_class_name", given=named, expected=kind)
    return config


def folder_of(path: str | Path) -> Path:
    """The folder that a path means: without the suffix of a file."""
    path = Path(path)
    return path.with_suffix("") if path.suffix == SUFFIX else path


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str) -> Path:
    """Write both files, each of them whole or not at all, and give the path of the tensors."""
    from diffusers import __version__

    told = {"_class_name": kind, "_diffusers_version": __version__, **config}
    written = write(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(told, indent=2, sort_keys=True) + "\n")
    return written
