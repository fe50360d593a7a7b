"""One door for every base: the bundled one, a folder, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from veneer.extras import require
from veneer.injection.errors import BaseModelError

from .folders import BUNDLED, check_pipeline_folder, path
from .hub import hub

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(base: str | Path = "bundled", **kwargs: Any) -> Any:
    """Load a diffusers pipeline of whichever class the base is: Stable Diffusion 1.x, 2, XL, 3, FLUX, PixArt, DiT, ...

    Args:
        base: `bundled`, a folder as `save_pretrained` writes it, or a hub name such as `owner/model`; a folder wins.
        kwargs: to `DiffusionPipeline.from_pretrained`; `dtype` is float32 unless given, and only safetensors are
            read.
    Returns:
        the pipeline, on the CPU.
    Raises:
        BaseModelError: the base is not there, lacks a part, holds only pickles, or the hub cannot be reached.
        MissingExtra: diffusers is not installed.
    """
    require("diffusers", "transformers")
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    source = find(base)
    word = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    older = kwargs.pop("torch_dtype", torch.float32)
    kwargs = {word: kwargs.pop("dtype", older), **kwargs, "use_safetensors": True}
    if isinstance(source, Path):
        check_pipeline_folder(source, given=kwargs.keys())
        return DiffusionPipeline.from_pretrained(str(source), **kwargs)
    with hub() as why:
        try:
            return DiffusionPipeline.from_pretrained(source, **({"local_files_only": True} if why else {}) | kwargs)
        except Exception as error:  # the hub's clients raise a dozen kinds, of several libraries
            raise BaseModelError(
                f"bases.load: {source!r} is no folder here, and the hub did not give it "
                f"({why or f'{type(error).__name__}: {_first(error)}'}). "
                "Check the name and the connection, or give a diffusers folder, or 'bundled'.",
                where="hub",
                given=source,
            ) from error


def find(base: str | Path) -> Path | str:
    """The folder of a base that is here, or its hub name.

    Raises:
        BaseModelError: neither a folder nor a possible hub name.
    """
    if base == "bundled":
        return path("bundled")
    if base in BUNDLED:
        message = f"bases.load: {base!r} is a CLIP and no pipeline; use veneer.base_models.load_clip({base!r})."
        raise BaseModelError(message, where="kind", given=base, expected="pipeline")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise BaseModelError(
            f"bases.load: {folder} is a single file; expected a diffusers folder. "
            "Convert it with diffusers' from_single_file(file).save_pretrained(folder).",
            file=folder,
            where="kind",
            given="file",
            expected="folder",
        )
    if isinstance(base, str) and HUB_NAME.fullmatch(base):
        return base
    message = f"bases.load: no {str(base)!r} here; expected 'bundled', a diffusers folder, or a hub name like owner/model."
    raise BaseModelError(message, where="base", given=str(base))


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
