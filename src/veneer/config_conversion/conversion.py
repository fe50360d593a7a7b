"""Recognition and conversion of another trainer's config file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config_file import read_table
from veneer.injection.errors import OptionError

from .ai_toolkit import convert_job
from .kohya_arguments import convert_arguments
from .kohya_datasets import convert_datasets
from .source_table import Remark, RunContent

ARGUMENTS = ("pretrained_model_name_or_path", "network_module", "network_dim", "dataset_config", "train_data_dir", "output_name")
"""Keys of which training arguments of sd-scripts have one."""


@dataclass(frozen=True)
class ConfigConversion:
    """A converted config.

    Args:
        trainer: `sd-scripts dataset config`, `sd-scripts training arguments` or `ai-toolkit job`.
        content: content of a config file of `veneer personalize`.
        remarks: keys that are not carried over as they are, in the order of the file.
    """

    trainer: str
    content: dict[str, Any]
    remarks: tuple[Remark, ...]


def convert_file(path: Path) -> ConfigConversion:
    """Converts a config of sd-scripts (TOML or JSON) or ai-toolkit (YAML or JSON).

    Raises:
        OptionError: the file cannot be read, is not a config of these trainers, or lacks a folder of images.
    """
    content, target = _read(path), RunContent()
    trainer = _trainer(content, path)
    if trainer == "ai-toolkit job":
        convert_job(content, path.parent, target)
    elif trainer == "sd-scripts dataset config":
        convert_datasets(content, target)
    else:
        convert_arguments(content, path.parent, target, _read)
    return ConfigConversion(trainer, target.content(), tuple(target.remarks))


def _trainer(content: Mapping[str, Any], path: Path) -> str:
    config = content.get("config")
    if isinstance(config, dict) and "process" in config:
        return "ai-toolkit job"
    flat = {key for name, value in content.items() for key in (value if isinstance(value, dict) else (name,))}
    if flat & {*ARGUMENTS}:
        return "sd-scripts training arguments"
    datasets = content.get("datasets")
    if isinstance(datasets, list) and all(isinstance(each, dict) and "subsets" in each for each in datasets):
        return "sd-scripts dataset config"
    message = (
        f"{path}: not a config of a supported trainer; expected sd-scripts' datasets with subsets, its training arguments, or "
        f"ai-toolkit's config with process. It has {', '.join(map(str, list(content)[:8])) or 'no keys'}."
    )
    raise OptionError(message, option="file", file=path, given=tuple(map(str, content)), expected=("datasets", "config.process"))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".json":
        return dict(read_table(path))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path}: cannot be read as JSON ({error}). Check the file."
        raise OptionError(message, option="file", file=path, given="unreadable", expected="JSON") from error
    if not isinstance(content, dict):
        message = f"{path}: got {type(content).__name__}; expected names and values."
        raise OptionError(message, option="file", file=path, given=type(content).__name__, expected="table")
    return content
