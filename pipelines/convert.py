"""Convert an adapter file to another format with the same ΔW of every weight."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from veneer import base_models, formats
from veneer.formats.native import KEY
from veneer.injection import OptionError

_log = logging.getLogger(__name__)

To = Literal["kohya", "lycoris", "diffusers", "peft_folder", "comfyui", "onetrainer", "xlabs", "embeddings", "native"]


@dataclass(frozen=True)
class ConvertConfig:
    """Configuration of `veneer convert` and its defaults.

    Args:
        file: a safetensors file of any format, a run folder or other folder with one, or a hub name such as `user/repo`.
        to: format to write; required: `kohya` (LoRA for A1111, Forge and ComfyUI), `lycoris` (its other methods), `diffusers`,
            `peft_folder`, `comfyui` (ComfyUI's own names), `onetrainer`, `xlabs` (FLUX.1), `embeddings` (textual inversion) or
            `native`.
        base: base model: `bundled`, a folder, a file, a hub name, or an architecture without weights such as `sdxl` or `flux`
            (default: that of a native file, else the architecture that fits the file).
        out: the new file, for `peft_folder` a folder (default: the old name with the format, beside the old file, for a hub
            name in the working directory).
    """

    file: Path
    to: To | None = None
    base: str | None = None
    out: Path | None = None


def convert(config: ConvertConfig) -> list[str]:
    """Loads the adapter on the base model, writes it, loads the new file and compares; no file is left if a ΔW differs.

    Returns:
        The files written, the precision of the comparison, and what the format does not contain.
    Raises:
        VeneerError: format or base is missing, the file is incompatible with the base model, or the format does not support it.
    """
    if config.to is None:
        message = f"convert: --to is missing; expected one of {', '.join(get_args(To))}."
        raise OptionError(message, option="to", method="convert", expected=get_args(To))
    source = formats.local_path(config.file)
    path = formats.read(source).path
    model, provenance = open_base(config.base, [path], "convert")
    folder = path.parent if source == config.file else Path()
    out = config.out or folder / f"{path.stem}-{config.to}.safetensors"
    return str(formats.convert(model, path, config.to, out, provenance)).splitlines()


def open_base(base: str | None, files: Sequence[Path], command: str) -> tuple[Any, dict[str, str]]:
    """The base model of adapter files, and its entry in the metadata of a new file: none for an architecture without weights.

    Args:
        base: as in the configs of commands; None means the base model that one of the files names, else the architecture of the
            first file that has one.
        command: for the error message.
    Raises:
        VeneerError: the base model cannot be loaded, or `base` is None and no file identifies it.
    """
    name = base or next((known for file in files if (known := base_of(file))), None)
    if name is not None and (name not in base_models.ARCHITECTURES or Path(name).is_dir()):
        return base_models.load(name), {"base": name}
    name = name or next((known for file in files if (known := formats.architecture_of(file))), None)
    if name is None:
        message = (
            f"{command}: --base is missing, and the names and shapes in {', '.join(map(str, files))} do not identify it. "
            f"Pass the base model, or one of the architectures {', '.join(base_models.ARCHITECTURES)}."
        )
        raise OptionError(message, option="base", method=command, file=files[0], expected=tuple(base_models.ARCHITECTURES))
    if base is None:
        _log.info("architecture: %s, by the names and shapes in the file; --base names another one", name)
    return base_models.architecture(name), {}


def base_of(path: Path) -> str | None:
    """The base model in the metadata of a native file, or None."""
    name = native_header(path).get("provenance", {}).get("base")
    return base_models.current_name(name) if isinstance(name, str) else None


def native_header(path: Path) -> dict[str, Any]:
    """Metadata of a native file; empty for other formats."""
    file = formats.read(path)
    return file.json(KEY) if KEY in file.metadata else {}
