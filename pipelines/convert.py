"""Convert an adapter file to another format with the same ΔW of every weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from veneer import base_models, formats
from veneer.injection import OptionError

from .generate import base_of

To = Literal["kohya", "lycoris", "diffusers", "peft_folder", "comfyui", "onetrainer", "xlabs", "embeddings", "native"]


@dataclass(frozen=True)
class ConvertConfig:
    """Configuration of `veneer convert` and its defaults.

    Args:
        file: a safetensors file of any format, or a folder with one.
        to: format to write.
        base: base model: `bundled`, a folder or a hub name (default: the base model that a native file was trained on).
        out: the new file, for peft_folder a folder (default: beside the old file, with the format in its name).
    """

    file: Path
    to: To | None = None
    base: str | None = None
    out: Path | None = None


def convert(config: ConvertConfig) -> list[str]:
    """Loads the adapter on the base model, writes it, loads the new file and compares; a file with another ΔW is deleted.

    Returns:
        The files written, the precision of the comparison, and what the format does not contain.
    Raises:
        VeneerError: format or base is missing, the file is incompatible with the base model, or the format does not support it.
    """
    if config.to is None:
        message = f"convert: --to is missing; expected one of {', '.join(get_args(To))}."
        raise OptionError(message, option="to", method="convert", expected=get_args(To))
    base = config.base or base_of(config.file)
    if base is None:
        message = (
            "convert: --base is missing, and the file does not name its base model, which is needed to resolve the weight names."
        )
        raise OptionError(message, option="base", method="convert", file=config.file)
    path = formats.read(config.file).path
    out = config.out or path.with_name(f"{path.stem}-{config.to}.safetensors")
    return str(formats.convert(base_models.load(base), path, config.to, out, {"base": base})).splitlines()
