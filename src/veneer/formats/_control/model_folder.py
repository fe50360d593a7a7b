"""Model folders as diffusers' `save_pretrained` writes them: `diffusion_pytorch_model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.injection import LoadError

from .._io.reader import File, read_json
from .._io.writer import write, write_text

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
STEM = "diffusion_pytorch_model"  # may be followed by a variant name such as .fp16
MAX_CONFIG_BYTES = 1_000_000  # maximum size of a config in bytes


def config_beside(file: File, kind: str) -> dict[str, Any]:
    """The config of a model folder; an empty dict for a single file.

    Args:
        kind: expected class name.
    Raises:
        LoadError: the config is not a regular file, not a JSON object, or of another class.
    """
    path = file.path.with_name(CONFIG)
    if not file.path.name.startswith(STEM) or not os.path.lexists(path):
        return {}
    if not path.is_file():
        message = f"{path}: not a regular file, but a folder, a device or a broken link. Copy it again, or remove it."
        raise LoadError(message, file=path, expected="file")
    config = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise LoadError(f"{path}: expected a JSON object; the file is corrupt.", file=path, expected="JSON object")
    class_name = config.get("_class_name", kind)
    if class_name != kind:
        message = f"{path}: the config is of a {str(class_name)[:80]}; expected {kind}. Load it with its own library."
        raise LoadError(message, file=path, where="_class_name", given=class_name, expected=kind)
    return config


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str) -> Path:
    """Writes the weights and the config, each atomically, and returns the path of the weights."""
    from diffusers import __version__

    content = {"_class_name": kind, "_diffusers_version": __version__, **config}
    written = write(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return written
