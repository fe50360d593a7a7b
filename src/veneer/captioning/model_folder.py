"""Folder of a captioning model: a local one, or a snapshot of a hub repository without pickles and code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.hub import parse_name
from veneer.hub.connection import hub
from veneer.hub.errors import hub_error

from .errors import CaptionError

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.csv", "*.model")
"""Files of a repository that are downloaded: configs, weights and vocabularies; neither pickles nor Python files."""


def model_folder(name: str) -> Path:
    """The folder of a model.

    Args:
        name: local folder, or hub name `USER/REPO[@REVISION]`.
    Raises:
        CaptionError: neither a folder nor a hub name, or no config or safetensors file in it.
        HubError: the repository cannot be downloaded.
    """
    path = Path(name).expanduser()
    folder = path if path.is_dir() else _snapshot(name)
    for where, pattern in (("config.json", "config.json"), ("weights", "*.safetensors")):
        if not any(folder.glob(pattern)):
            given = tuple(sorted(file.name for file in folder.iterdir()))
            message = f"caption: {name} has no {pattern}; expected a model folder with safetensors, as save_pretrained writes it."
            raise CaptionError(message, file=folder, where=where, given=given, expected=pattern)
    return folder


def _snapshot(name: str) -> Path:
    parsed = parse_name(name)
    if parsed is None or parsed.file is not None:
        message = (
            f"caption: model is {name!r}; expected a local folder, or a hub name such as Salesforce/blip-image-captioning-base."
        )
        raise CaptionError(message, where="model", given=name, expected="a folder or USER/REPO")
    from huggingface_hub import snapshot_download

    with hub() as why:
        try:
            return Path(
                snapshot_download(
                    parsed.repo, revision=parsed.revision, allow_patterns=list(PATTERNS), local_files_only=bool(why)
                )
            )
        except Exception as error:  # the hub's client raises a dozen kinds
            raise hub_error(error, name, "read") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model.

    Raises:
        CaptionError: not a JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{file}: not JSON ({error}); expected the config of a model. Copy it again."
        raise CaptionError(message, file=file, where="config.json", given="unreadable", expected="JSON") from error
    if not isinstance(config, dict):
        message = f"{file}: {type(config).__name__}; expected a JSON object. Copy it again."
        raise CaptionError(message, file=file, where="config.json", given=type(config).__name__, expected="object")
    return config
