"""Inspect an adapter file: format, method, blocks, and compatibility with a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from veneer.formats import inspect, local_path

from .convert import open_base


@dataclass(frozen=True)
class InspectConfig:
    """Configuration of `veneer inspect` and its defaults.

    Args:
        file: a safetensors file of any format, a folder with one, or a hub name such as `user/repo`.
        base: base model to compare the file with: `bundled`, a folder, a file, a hub name, or an architecture without weights
            such as `sdxl` (default: no comparison).
        json: print one JSON object instead of a table.
    """

    file: Path
    base: str | None = None
    json: bool = False


def inspect_file(config: InspectConfig) -> list[str]:
    """The lines to print: format, family, method, rank and alpha of each block, size; with a base also unused and missing
    tensors.

    Raises:
        VeneerError: an incomplete safetensors file, or a base model that does not exist.
    """
    file = local_path(config.file)
    found = inspect(file, open_base(config.base, [file], "inspect")[0] if config.base else None)
    return [found.to_json()] if config.json else str(found).splitlines()
