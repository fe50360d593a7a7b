"""Where the bundled bases and the example pictures lie, and whether a folder is a base that can be loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from veneer.injection.errors import BaseModelError

BUNDLED = ("bundled", "bundled_clip")
"""Names of the bundled bases: a Stable Diffusion pipeline, and the CLIP that judges its pictures."""

FORMER_NAMES = {"shipped": "bundled", "shipped_clip": "bundled_clip"}
"""Names of the bundled bases in files of earlier versions."""

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5"})


def path(name: str = "bundled") -> Path:
    """The folder of a bundled base: an ordinary diffusers or open_clip folder.

    Args:
        name: `bundled` or `bundled_clip`.
    Raises:
        BaseModelError: another name, or the package was installed without its weights.
    """
    if name not in BUNDLED:
        message = f"bases.path: {name!r} is no bundled base; expected one of: {', '.join(BUNDLED)}."
        raise BaseModelError(message, where="bundled", given=name, expected=tuple(BUNDLED))
    folder = Path(__file__).parent / name
    if not any(folder.rglob("*.safetensors")):
        message = f"bases.path: {folder} has no weights; install the whole package, or run pipelines/pretrain_base.py."
        raise BaseModelError(message, file=folder, where="weights", given="missing")
    return folder


def current_name(recorded: str) -> str:
    """The present name of a base that a file records; only the bundled ones were renamed."""
    return FORMER_NAMES.get(recorded, recorded)


def examples() -> Path:
    """The folder of example pictures: five of an octopus, which the bundled base never saw, with captions."""
    return Path(__file__).parent / "examples"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BaseModelError: the file is broken or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file}: cannot be read as JSON ({error}); copy the base again."
        raise BaseModelError(message, file=file, given="unreadable", expected="JSON") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BaseModelError(
            f"{file}: {kind}; expected a JSON object. Copy the base again.", file=file, given=kind, expected="object"
        )
    return value


def check_pipeline_folder(folder: Path, given: Collection[str] = ()) -> None:
    """See that a folder is a whole diffusers pipeline in safetensors.

    Args:
        given: parts that the caller brings along, which the folder may lack.
    Raises:
        BaseModelError: no `model_index.json`, an unknown pipeline class, a missing part, or a part that has pickles only.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        message = f"{folder}: no model_index.json; expected a diffusers pipeline folder, as save_pretrained writes it."
        raise BaseModelError(message, file=folder, where="model_index.json", given="missing")
    index = read_json(index_file)
    for part in _required(index, index_file):
        listed = index.get(part)
        present = isinstance(listed, list) and listed and listed[0] is not None and (folder / part).is_dir()
        if not present and part not in given:
            raise BaseModelError(
                f"{folder}: its {part} is missing ({index['_class_name']} needs {', '.join(_required(index, index_file))}). "
                f"Copy the folder {part} into the base, or pass {part}=... to load.",
                file=folder,
                where=part,
                given="missing",
                expected=tuple(_required(index, index_file)),
            )
    for inside in sorted(p for p in folder.iterdir() if p.is_dir() and p.name in index and p.name not in given):
        _check_weights(inside)


def _required(index: dict[str, Any], file: Path) -> list[str]:
    """Parts that the pipeline's class cannot do without, in its own order."""
    import diffusers

    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if cls is None:
        message = f"{file}: _class_name is {name!r}, which diffusers {diffusers.__version__} does not have."
        raise BaseModelError(message, file=file, where="_class_name", given=name)
    parameters = inspect.signature(cls.__init__).parameters
    optional = {"self", *cls._optional_components}
    return [n for n, p in parameters.items() if n not in optional and p.default is p.empty]


def _check_weights(part: Path) -> None:
    names = [file.name for file in part.iterdir()]
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise BaseModelError(
            f"{part}: holds only pickles ({', '.join(pickles)}), which can run code when they are opened, so they are not read. "
            "Convert a base that you trust: diffusers' DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder).",
            file=part,
            where="weights",
            given=tuple(pickles),
            expected=".safetensors",
        )
