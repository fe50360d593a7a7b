"""Loading of base models: the bundled one, a diffusers folder, a single file, or a hub name."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.extras import require
from veneer.hub.connection import download
from veneer.injection.errors import BaseModelError

from .architectures import ARCHITECTURES
from .devices import Dtype, resolve_dtype
from .folders import BUNDLED, PICKLES, check_pipeline_folder, check_unquantized, path
from .gguf_file import load_gguf
from .quantization import DENOISERS, Quantize, parse_quantize, quantize_components, resolve_components
from .single_file import check_suffix, load_single_file

logger = logging.getLogger(__name__)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(base: str | Path = "bundled", *, quantize: Quantize | None = None, device: Any = "cpu", **kwargs: Any) -> Any:
    """Loads a diffusers pipeline of any class: Stable Diffusion 1.x, 2, XL, 3, FLUX, PixArt, DiT, ...

    Args:
        base: `bundled`, a folder written by `save_pretrained`, a single `.safetensors` file of Stable Diffusion 1.x or XL, or a
            hub name such as `owner/model`; folders and files have precedence.
        quantize: quantization of frozen linear layers: a kind such as `nf4` or a GGUF file for the denoiser, or a mapping of
            components to them, such as `{"transformer": "nf4", "text_encoder_2": "int8"}`. See `KINDS`.
        device: device on which layers are quantized, and on which they remain; all other weights are on the CPU.
        kwargs: passed to `DiffusionPipeline.from_pretrained`; `dtype` defaults to float32, and only safetensors are read.
    Returns:
        The pipeline, on the CPU except for layers quantized on `device`.
    Raises:
        OptionError: an unknown kind or component in `quantize`.
        BaseModelError: the base model is missing, incomplete or has only pickles, or the hub is unreachable.
        MissingExtra: diffusers, or the library of a quantization, is not installed.
    """
    require("diffusers", "transformers")
    recipes = parse_quantize(quantize)
    import diffusers
    import torch

    source = find(base)
    keyword = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    dtype = kwargs.pop("torch_dtype", torch.float32)
    kwargs = {keyword: kwargs.pop("dtype", dtype), **kwargs}
    files = {name: value for name, value in recipes.items() if isinstance(value, Path)}
    if files:
        kwargs |= _load_gguf_files(source, files, kwargs[keyword])
    pipe = _load_float(source, **kwargs)
    for layers in quantize_components(pipe, recipes, device):
        logger.info("%s", layers)
    return pipe


def load_on_device(
    base: str | Path, device: Any, dtype: Dtype | None = None, quantize: Quantize | None = None, *, on_cpu: bool = False
) -> Any:
    """`load` for training and generation: the pipeline on a device.

    Args:
        device: a device or its name. `dtype`: of the base model (default: `resolve_dtype`). `base`, `quantize`: see `load`.
        on_cpu: leave float weights on the CPU, from which offloading or sharding moves them.
    """
    pipe = load(base, quantize=quantize, device=device, dtype=resolve_dtype(dtype, device))
    return pipe if on_cpu else pipe.to(device)


def _load_float(source: Path | str, **kwargs: Any) -> Any:
    """The pipeline without quantization of its float weights."""
    from diffusers import DiffusionPipeline

    if isinstance(source, Path) and source.is_file():
        return load_single_file(source, **kwargs)
    kwargs["use_safetensors"] = True
    if isinstance(source, Path):
        check_pipeline_folder(source, given=kwargs.keys())
        check_unquantized(source, given=kwargs.keys())
        return DiffusionPipeline.from_pretrained(str(source), **kwargs)
    with download(source) as offline:
        return DiffusionPipeline.from_pretrained(source, **offline | kwargs)


def _load_gguf_files(source: Path | str, files: Mapping[str, Path], dtype: Any) -> dict[str, Any]:
    """Components of GGUF files by name, as arguments of `from_pretrained`.

    Raises:
        OptionError: the base model has no such component.
        BaseModelError: the base model is a single file, which has no configs; or a file is of another model; or the hub is
            unreachable.
    """
    from diffusers import DiffusionPipeline

    if isinstance(source, Path) and not source.is_dir():
        message = f"load: {source} has no configs for a GGUF file; expected a diffusers folder or a hub name as the base model."
        raise BaseModelError(message, file=source, where="base", given="file", expected="folder")
    if isinstance(source, Path):
        check_pipeline_folder(source, given=DENOISERS)
    context: Any = contextlib.nullcontext({}) if isinstance(source, Path) else download(source)
    with context as offline:
        index = DiffusionPipeline.load_config(str(source), **offline)
        index = {name: entry for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is not None}
        resolved = resolve_components(files, list(index))
        return {name: load_gguf(Path(str(file)), source, name, tuple(index[name]), dtype) for name, file in resolved.items()}


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
