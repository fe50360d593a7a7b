"""Convert a config of kohya's sd-scripts or ai-toolkit to one of `veneer personalize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from veneer import methods
from veneer.atomic_files import write_atomically
from veneer.config_conversion import convert_file
from veneer.config_file import entries_of, table_to_toml
from veneer.injection import OptionError
from veneer.training.method_names import split_methods
from veneer.training.personalization_config import PersonalizeConfig


@dataclass(frozen=True)
class ConvertConfigConfig:
    """Configuration of `veneer convert-config` and its defaults.

    Args:
        file: dataset config or training arguments of sd-scripts (TOML or JSON), or job of ai-toolkit (YAML or JSON).
        out: the new file (default: beside the old one, with the ending `-veneer.toml`).
    """

    file: Path
    out: Path | None = None


def convert_config(config: ConvertConfigConfig) -> list[str]:
    """Writes the config for `veneer personalize --config`.

    Returns:
        The file written, and every key that is not carried over as it is, with the reason.
    Raises:
        OptionError: the file is not a config of these trainers, has a value of another type, or the new file exists.
    """
    out = config.out or config.file.with_name(f"{config.file.stem}-veneer.toml")
    if out.exists():
        raise OptionError(f"{out} exists. Choose another --out, or delete it.", option="out", file=out, given="exists")
    conversion = convert_file(config.file)
    names = split_methods(conversion.content.get("method", "lora"))
    entries_of(conversion.content, PersonalizeConfig, {name: methods.get(name) for name in names})
    write_atomically(out, table_to_toml("personalize", conversion.content).encode())
    lines = [f"{out}: {conversion.trainer}, for veneer personalize --config {out}"]
    if not conversion.remarks:
        return [*lines, "every key is carried over"]
    return [*lines, f"{len(conversion.remarks)} keys are not carried over as they are:", *map(str, conversion.remarks)]


if __name__ == "__main__":
    import sys

    from veneer.cli import main

    sys.exit(main(["convert-config", *sys.argv[1:]]))
