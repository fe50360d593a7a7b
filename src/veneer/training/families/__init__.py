"""Registry of pipeline families, one module each, grouped by what the denoiser predicts and of what."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from veneer.injection.errors import BaseModelError

from .errors import PromptError, PromptWarning
from .family import Family, Sizes
from .pipeline_outputs import generated_images

__all__ = [
    "BaseModelError", "Family", "PromptError", "PromptWarning", "Sizes", "check_folder", "families", "family",
    "generated_images", "is_single_prompt", "sampling_arguments",
]  # fmt: skip

EDITING = ("Kontext", "Fill", "Edit", "Control", "Pix2Pix", "Redux")
"""Parts of the names of pipelines whose transformer needs an image as its input."""


def families() -> dict[str, type[Family]]:
    """Module name → family, in alphabetical order: every subclass of `Family` defined in a module of a sub-package."""
    subclasses = {}
    for path in (info.name for info in pkgutil.walk_packages(__path__, f"{__name__}.") if info.name != f"{__name__}.family"):
        for value in vars(importlib.import_module(path)).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__ == path:
                subclasses[path.rpartition(".")[2]] = value
    return dict(sorted(subclasses.items()))


def family(pipe: Any, **options: Any) -> Family:
    """The family of a pipeline.

    Args:
        pipe: a diffusers pipeline.
        options: of `Family`: `truncate`, `max_tokens`, `guidance`.
    Raises:
        BaseModelError: an unsupported pipeline class, or a missing component.
    """
    if kind := _kind_of(pipe):
        return kind(pipe, **options)
    raise _unsupported(type(pipe).__name__)


def sampling_arguments(pipe: Any, arguments: dict[str, Any], prompts: int) -> dict[str, Any]:
    """`Family.sampling_arguments` of a pipeline's family; the arguments themselves if it has none."""
    kind = _kind_of(pipe)
    return kind.sampling_arguments(arguments, prompts) if kind else arguments


def is_single_prompt(pipe: Any) -> bool:
    """True if a pipeline takes one prompt in a call: `Family.single_prompt` of its family."""
    kind = _kind_of(pipe)
    return kind is not None and kind.single_prompt


def _kind_of(pipe: Any) -> type[Family] | None:
    return next((kind for kind in families().values() if kind.matches(pipe)), None)


def check_folder(folder: Path) -> None:
    """Checks that a saved pipeline is complete and supported, before diffusers loads it.

    Args:
        folder: folder written by `save_pretrained`: `model_index.json` and one folder per component.
    Raises:
        BaseModelError: no readable `model_index.json`, an unsupported pipeline class, or a component that is not listed or not on
            disk.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder} is not a diffusers pipeline: its model_index.json is invalid ({error})"
        raise BaseModelError(message, file=folder, where="model_index.json") from error
    known = families()
    kind = next((kind for kind in known.values() if name in kind.pipelines), None)
    if kind is None:
        raise _unsupported(name, folder)
    missing = [part for part in kind.needs if not (index.get(part) or [None])[0] or not (folder / part).is_dir()]
    if missing:
        raise BaseModelError(
            f"{folder} ({name}) has no {', '.join(missing)}. Training needs {', '.join(kind.needs)}: download all components.",
            file=folder,
            where="missing",
            given=tuple(missing),
            expected=kind.needs,
        )


def _unsupported(name: str, folder: Path | None = None) -> BaseModelError:
    """The error for a pipeline class without a family; `where` is `editing` for a pipeline that changes given images."""
    known, start = families(), f"{folder}: " if folder else ""
    pipelines = "; ".join(f"{family} ({', '.join(kind.pipelines)})" for family, kind in known.items())
    if any(part in name for part in EDITING):
        message = (
            f"{start}{name} is not supported for training: it edits images, which needs pairs of an image and its edit, "
            f"and photos are not. Train on its text-to-image base model. Supported pipelines: {pipelines}."
        )
        return BaseModelError(message, file=folder, where="editing", given=name, expected=tuple(known))
    message = f"{start}{name} is not supported for training. Supported pipelines: {pipelines}."
    return BaseModelError(message, file=folder, where="family", given=name, expected=tuple(known))
