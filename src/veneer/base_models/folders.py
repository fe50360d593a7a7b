"""Folders of the bundled base models and example images, and checks of diffusers pipeline folders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from veneer.injection.errors import BaseModelError

BUNDLED = ("bundled", "bundled_clip")
"""Names of the bundled base models: a Stable Diffusion pipeline, and the CLIP for its similarity metrics."""

EXAMPLES = ("octopus", "sneaker")
"""Names of the bundled example subjects."""

FORMER_NAMES = {"shipped": "bundled", "shipped_clip": "bundled_clip"}
"""Earlier names of the bundled base models, which files may contain."""

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5"})


def path(name: str = "bundled") -> Path:
    """Folder of a bundled base model, in the ordinary diffusers or open_clip layout.

    Args:
        name: `bundled` or `bundled_clip`.
    Raises:
        BaseModelError: unknown name, or the package was installed without the weights.
    """
    if name not in BUNDLED:
        message = f"path: {name!r} is not a bundled base model; expected one of {', '.join(BUNDLED)}."
        raise BaseModelError(message, where="bundled", given=name, expected=tuple(BUNDLED))
    folder = Path(__file__).parent / name
    if not any(folder.rglob("*.safetensors")):
        message = f"path: {folder} has no weights; install the complete package, or run pipelines/pretrain_base.py."
        raise BaseModelError(message, file=folder, where="weights", given="missing")
    return folder


def current_name(recorded: str) -> str:
    """The current name of a base model that a file records; only the bundled ones were renamed."""
    return FORMER_NAMES.get(recorded, recorded)


def examples(name: str = "octopus") -> Path:
    """Folder of example images of a subject that the bundled base was not trained on.

    Args:
        name: `octopus`, five images with captions, or `sneaker`, six photos of a shoe without captions.
    Raises:
        BaseModelError: unknown name.
    """
    if name not in EXAMPLES:
        message = f"examples: {name!r} is not a bundled example; expected one of {', '.join(EXAMPLES)}."
        raise BaseModelError(message, where="examples", given=name, expected=EXAMPLES)
    return Path(__file__).parent / "examples" / name


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        BaseModelError: the file is not valid JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file}: not readable as JSON ({error}); copy the base model again."
        raise BaseModelError(message, file=file, given="unreadable", expected="JSON") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BaseModelError(
            f"{file}: {kind}; expected a JSON object. Copy the base model again.", file=file, given=kind, expected="object"
        )
    return value


def check_pipeline_folder(folder: Path, given: Collection[str] = ()) -> None:
    """Checks that a folder is a complete diffusers pipeline in safetensors format.

    Args:
        given: components that the caller passes separately, which may be missing in the folder.
    Raises:
        BaseModelError: no `model_index.json`, an unknown pipeline class, a missing component, or a component with pickles only.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        message = f"{folder}: no model_index.json; expected a diffusers pipeline folder, as written by save_pretrained."
        raise BaseModelError(message, file=folder, where="model_index.json", given="missing")
    index = read_json(index_file)
    for part in _required(index, index_file):
        entry = index.get(part)
        present = isinstance(entry, list) and entry and entry[0] is not None and (folder / part).is_dir()
        if not present and part not in given:
            raise BaseModelError(
                f"{folder}: no component {part} ({index['_class_name']} needs {', '.join(_required(index, index_file))}). "
                f"Copy the folder {part} into the base model, or pass {part}=... to load.",
                file=folder,
                where=part,
                given="missing",
                expected=tuple(_required(index, index_file)),
            )
    for inside in sorted(p for p in folder.iterdir() if p.is_dir() and p.name in index and p.name not in given):
        _check_weights(inside)


def check_unquantized(folder: Path, given: Collection[str] = ()) -> None:
    """Rejects components that bitsandbytes has quantized where diffusers cannot load them, which is without an accelerator.

    Args:
        given: components that the caller passes separately.
    Raises:
        BaseModelError: with the component and its quantization.
    """
    import torch

    for config in sorted(folder.glob("*/config.json")):
        quantization = read_json(config).get("quantization_config") if config.parent.name not in given else None
        method = str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else ""
        if "bitsandbytes" in method.lower() and not torch.accelerator.is_available():
            message = (
                f"{folder}: {config.parent.name} is saved in a quantization of {method}, which diffusers loads on an accelerator "
                "only. Load the float base model with quantize=... (--quantize) instead."
            )
            raise BaseModelError(message, file=folder, where=config.parent.name, given=method, expected="float weights")


def _required(index: dict[str, Any], file: Path) -> list[str]:
    """Required components of the pipeline class, in its order."""
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
            f"{part}: only pickles ({', '.join(pickles)}), which can run code when loaded; expected safetensors. "
            "If you trust the base model, convert it: DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder).",
            file=part,
            where="weights",
            given=tuple(pickles),
            expected=".safetensors",
        )
