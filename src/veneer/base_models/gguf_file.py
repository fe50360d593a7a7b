"""Denoisers in GGUF files, read by diffusers: packed weights that are dequantized in each forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from veneer.injection.errors import BaseModelError
from veneer.injection.quantized_weight import is_quantized

MAGIC = b"GGUF"


def load_gguf(file: Path, source: str | Path, component: str, kind: tuple[str, str], dtype: Any) -> nn.Module:
    """Loads a component of a diffusers pipeline from a GGUF file.

    Args:
        source: folder or hub name of the base model, which has the config. `component`: its name there.
        kind: library and class of the component, as in `model_index.json`. `dtype`: in which it computes.
    Raises:
        BaseModelError: not a GGUF file, of another model, or diffusers cannot read this class from one.
    """
    import diffusers
    from diffusers import GGUFQuantizationConfig

    with file.open("rb") as stream:
        start = stream.read(4)
    if start != MAGIC:
        message = f"load: {file} is not a GGUF file; expected one that starts with {MAGIC!r}."
        raise BaseModelError(message, file=file, where="kind", given=start, expected=MAGIC)
    library, name = kind
    cls = getattr(diffusers, name, None) if library == "diffusers" else None
    if cls is None or not hasattr(cls, "from_single_file"):
        message = f"load: diffusers cannot read {name} ({component}) from a GGUF file; expected a transformer such as FLUX."
        raise BaseModelError(message, file=file, where=component, given=name, expected="from_single_file")
    try:
        model: nn.Module = cls.from_single_file(
            str(file), config=str(source), subfolder=component, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
        )  # fmt: skip
    except Exception as error:  # diffusers raises several kinds for missing and misshapen tensors
        message = f"load: {file} could not be loaded as the {component} of {source}: {type(error).__name__}: {str(error)[:300]}"
        raise BaseModelError(message, file=file, where=component, given=type(error).__name__, expected=name) from error
    _check(model, file, component)
    return model


def _check(model: nn.Module, file: Path, component: str) -> None:
    """Raises `BaseModelError` if a tensor is missing, or one that is no weight of a linear layer is quantized."""
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        message = f"load: {file} is of another model: it lacks {len(missing)} tensors of the {component}, such as {missing[0]}."
        raise BaseModelError(message, file=file, where="tensors", given=tuple(missing), expected=type(model).__name__)
    for path, module in model.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and is_quantized(tensor) and not (isinstance(module, nn.Linear) and name == "weight"):
                message = f"load: {file} has {path}.{name} quantized, which is not the weight of a linear layer."
                raise BaseModelError(message, file=file, where=f"{path}.{name}", given=type(module).__name__, expected="Linear")
