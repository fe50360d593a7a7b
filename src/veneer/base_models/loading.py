"""Loading of base models: the bundled one, a diffusers folder, a single file, or a hub name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from veneer.extras import require
from veneer.injection.errors import BaseModelError

from .architectures import ARCHITECTURES
from .folders import BUNDLED, PICKLES, check_pipeline_folder, path
from .hub import hub
from .single_file import check_suffix, load_single_file

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(base: str | Path = "bundled", **kwargs: Any) -> Any:
    """Loads a diffusers pipeline of any class: Stable Diffusion 1.x, 2, XL, 3, FLUX, PixArt, DiT, ...

    Args:
        base: `bundled`, a folder written by `save_pretrained`, a single `.safetensors` file of Stable Diffusion 1.x or XL, or a
            hub name such as `owner/model`; folders and files have precedence.
        kwargs: passed to `DiffusionPipeline.from_pretrained`; `dtype` defaults to float32, and only safetensors are read.
    Returns:
        The pipeline, on the CPU.
    Raises:
        BaseModelError: the base model is missing, incomplete or has only pickles, or the hub is unreachable.
        MissingExtra: diffusers is not installed.
    """
    require("diffusers", "transformers")
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    source = find(base)
    keyword = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    dtype = kwargs.pop("torch_dtype", torch.float32)
    kwargs = {keyword: kwargs.pop("dtype", dtype), **kwargs}
    if isinstance(source, Path) and source.is_file():
        return load_single_file(source, **kwargs)
    kwargs["use_safetensors"] = True
    if isinstance(source, Path):
        check_pipeline_folder(source, given=kwargs.keys())
        return DiffusionPipeline.from_pretrained(str(source), **kwargs)
    with hub() as why:
        try:
            return DiffusionPipeline.from_pretrained(source, **({"local_files_only": True} if why else {}) | kwargs)
        except Exception as error:  # the hub's clients raise a dozen kinds, of several libraries
            raise BaseModelError(
                f"load: {source!r} is not a local folder, and could not be loaded from the hub "
                f"({why or f'{type(error).__name__}: {_first_line(error)}'}). "
                "Check the name and the connection, or use a diffusers folder or 'bundled'.",
                where="hub",
                given=source,
            ) from error


def find(base: str | Path) -> Path | str:
    """The local folder or file of a base model, or its hub name.

    Raises:
        BaseModelError: neither a folder or file nor a valid hub name.
    """
    if base == "bundled":
        return path("bundled")
    if base in BUNDLED:
        message = f"load: {base!r} is a CLIP; expected a pipeline. Use veneer.base_models.load_clip({base!r})."
        raise BaseModelError(message, where="kind", given=base, expected="pipeline")
    folder = Path(base).expanduser()
    if folder.is_file():
        check_suffix(folder)
    if folder.exists():
        return folder
    if folder.suffix in (".safetensors", *PICKLES):
        message = f"load: no file {folder}; check the path."
        raise BaseModelError(message, file=folder, where="base", given=str(base))
    if isinstance(base, str) and HUB_NAME.fullmatch(base):
        return base
    if base in ARCHITECTURES:
        message = (
            f"load: {base!r} is an architecture without weights, for inspect, convert, merge and resize; expected a base model: "
            "a diffusers folder, a .safetensors file, or a hub name such as owner/model."
        )
        raise BaseModelError(message, where="kind", given=str(base), expected="weights")
    message = f"load: {str(base)!r} not found; expected 'bundled', a diffusers folder, a file, or a hub name such as owner/model."
    raise BaseModelError(message, where="base", given=str(base))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
